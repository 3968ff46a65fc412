"""Where the time of a warm load goes: its Python stacks sampled by py-spy, its processor time sampled by perf.

A process loads a checkpoint again and again as MXFP4 from a warm page cache. First py-spy attaches to it: the share of
each stage in samples of threads that run. Then, where perf is installed, perf attaches to it: page faults, copies out
of the page cache, compiled kernels and the interpreter, which py-spy cannot tell apart. The sampled stacks stay beside
the JSON as `.folded`, which flamegraph.pl and speedscope read.

    python bench/profile_load.py
    python bench/profile_load.py --checkpoint moe --loads 20
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make, shards_of
from load_process import set_page_cache
from machine import describe_machine, headline
from markdown import markdown
from quantload import load_quantized
from recipes import RECIPES
from result_files import RESULTS, write_result

WARM_UP_SCALE = 0.002
SCHEME = "quark_mxfp4"
RATE = 250
PERF_RATE = 997
ATTACH_SECONDS = 2.0
# The first of these found in a stack, from the innermost frame out, names its stage.
STAGES = (
    ("checkpoint/source.py", "reading: preadv, page faults of what is kept as stored"),
    ("NumbaKernels.", "quantizing: kernels, page faults of codes and scales"),
    ("kernels/", "quantizing: kernels, page faults of codes and scales"),
    ("checkpoint/reader.py", "Python around a read"),
    ("online/", "Python around a piece"),
    ("AnonymousRssProbe.sample", "watching memory"),
    ("draft_load (", "planning: index, skeleton, routes, pieces"),
    ("finish (", "finishing the model"),
    ("load_quantized (", "the rest of the load"),
)
ELSEWHERE = "outside of a load"
# The first of these symbols found in a call chain, from the innermost out, says what the processor did.
KERNEL_PARTS = (
    ("page_fault", "page faults: finding and clearing new memory"),
    ("preadv", "reading: copying out of the page cache"),
    ("unmap", "giving memory back"),
    ("madvise", "giving memory back"),
)
COMPILED, PYTHON, OTHER = "compiled kernels", "the Python interpreter", "other libraries and the kernel's rest"


def stage_of(stack: str) -> str:
    """The stage a stack of py-spy (frames from the outermost in, joined by `;`) belongs to."""
    for frame in reversed(stack.split(";")):
        for pattern, stage in STAGES:
            if pattern in frame:
                return stage
    return ELSEWHERE


def part_of(chain: list[str]) -> str:
    """What a call chain of perf ("symbol (object)", from the innermost out) was doing."""
    for frame in chain:
        for pattern, part in KERNEL_PARTS:
            if pattern in frame:
                return part
    innermost = chain[0] if chain else ""
    if "libpython" in innermost or "bin/python" in innermost:
        return PYTHON
    return COMPILED if "JIT" in innermost or "unknown" in innermost or "//anon" in innermost else OTHER


def chains(script: Iterable[str]) -> Iterator[tuple[float, list[str]]]:
    """Time and call chain of every sample in the output of `perf script -F time,ip,sym,dso`."""
    moment = 0.0
    chain: list[str] = []
    for line in (*script, ""):
        head, _, rest = line.strip().partition(" ")
        if not head and chain:
            yield moment, chain
            chain = []
        elif head.endswith(":"):
            moment = float(head[:-1])
        elif head:
            chain.append(rest)


class Profiled:
    """A process that loads `folder` `loads` times once it is told to."""

    def __init__(self, folder: Path, warm_up: Path, loads: int) -> None:
        command = [sys.executable, __file__, "--loads", str(loads), "--child", str(folder), str(warm_up)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that loads has failed; what it said stands above")
        return line

    def run(self, profiler: list[str]) -> list[tuple[float, float]]:
        """Start `profiler` on the process, let it load, stop both; when each load began and ended, seconds."""
        watching = subprocess.Popen([*profiler, str(self.process.pid)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with watching, self.process:
            try:
                time.sleep(ATTACH_SECONDS)
                if watching.poll() is not None:
                    raise RuntimeError(f"{profiler[0]} ended at once: {watching.communicate()[1].decode()[-300:]}")
                assert self.process.stdin is not None
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
                return [(begin, end) for begin, end in json.loads(self._line())]
            finally:
                watching.send_signal(signal.SIGINT)
                watching.communicate(timeout=60)
                self.process.kill()


def profiled_loads(folder: Path, loads: int) -> list[tuple[float, float]]:
    """Load again and again, and say when each load began and ended; its name is in the stacks."""
    found = []
    for _ in range(loads):
        gc.collect()
        begin = time.perf_counter()
        model = load_quantized(str(folder), quantization=SCHEME, device="cpu")
        found.append((begin, time.perf_counter()))
        del model
    return found


def _child(folder: Path, warm_up: Path, loads: int) -> None:
    load_quantized(str(warm_up), quantization=SCHEME, device="cpu")
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(profiled_loads(folder, loads)), flush=True)
    time.sleep(60)  # until it is ended: the profiler wants to write its file first


def spy(py_spy: str, profiled: Profiled) -> tuple[dict[str, float], list[float], dict[str, int]]:
    """Thread-seconds of one load by stage, seconds of the loads, and the stacks with their counts."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "stacks"
        command = [py_spy, "record", "--rate", str(RATE), "--format", "raw", "--output", str(path), "--pid"]
        loads = profiled.run(command)
        stacks: collections.Counter[str] = collections.Counter()
        for line in path.read_text().splitlines():
            stack, _, samples = line.rpartition(" ")
            stacks[stack.partition("profiled_loads")[2].partition(";")[2] or stack] += int(samples)
    stages: collections.Counter[str] = collections.Counter()
    for stack, count in stacks.items():
        stages[stage_of(stack)] += count
    shares = {stage: count / RATE / len(loads) for stage, count in stages.most_common() if stage != ELSEWHERE}
    seconds = [end - begin for begin, end in loads]
    return shares, seconds, {stack: count for stack, count in stacks.items() if stage_of(stack) != ELSEWHERE}


def perf(profiled: Profiled) -> dict[str, float]:
    """Processor seconds of one load by what was done."""
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "samples")
        record = ["perf", "record", "-k", "CLOCK_MONOTONIC", "-e", "cpu-clock", "-F", str(PERF_RATE), "-g", "-o", path]
        loads = profiled.run([*record, "-p"])
        script = ["perf", "script", "-i", path, "-F", "time,ip,sym,dso"]
        text = subprocess.run(script, capture_output=True, text=True, check=True, errors="replace").stdout
    # The clock is that of `perf_counter`, so what was sampled between the loads can be left out.
    inside = (chain for at, chain in chains(text.splitlines()) if any(begin <= at <= end for begin, end in loads))
    parts = collections.Counter(part_of(chain) for chain in inside)
    return {part: count / PERF_RATE / len(loads) for part, count in parts.most_common()}


def render(result: dict[str, Any]) -> str:
    """Both profiles as tables."""
    median = statistics.median(result["seconds"])
    head = f"{result['checkpoint']} warm, {median:.3f} s a load: stage (py-spy)"
    tables = [_shares(head, "thread-seconds", result["stages"])]
    if result["parts"]:
        tables.append(_shares("what the processors did (perf)", "seconds", result["parts"]))
    return "\n\n".join(tables)


def _shares(head: str, unit: str, seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    lines = [[name, f"{value:.3f}", f"{value / total:.0%}"] for name, value in seconds.items()]
    return markdown(lines, (head, unit, "share"))


def main() -> None:
    """Profile, print the tables, write the dated JSON and the stacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", choices=sorted(RECIPES), default="dense")
    parser.add_argument("--scale", type=float, default=1.0, help="size relative to the full checkpoint (default 1)")
    parser.add_argument("--loads", type=int, default=12)
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="where the checkpoint is made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, warm_up = options.child
        _child(folder, warm_up, options.loads)
        return
    py_spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if py_spy is None:
        raise SystemExit("py-spy is not installed: pip install py-spy")
    machine = describe_machine()
    print(headline(machine))
    warm_up = make(options.checkpoint, WARM_UP_SCALE, options.work)
    folder = make(options.checkpoint, options.scale, options.work)
    set_page_cache(shards_of(folder), cold=False)
    stages, seconds, stacks = spy(py_spy, Profiled(folder, warm_up, options.loads))
    parts = perf(Profiled(folder, warm_up, options.loads)) if shutil.which("perf") else {}
    result = {"machine": machine, "checkpoint": options.checkpoint, "settings": {"scale": options.scale}}
    result |= {"loads": options.loads, "seconds": seconds, "stages": stages, "parts": parts}
    print(f"\n{render(result)}")
    reduced = "" if options.scale == 1 else f"scale{options.scale:g}"
    path = write_result("profile_load", result, options.results, reduced)
    path.with_suffix(".folded").write_text("".join(f"{stack} {count}\n" for stack, count in sorted(stacks.items())))
    print(f"\nwritten: {path} and the stacks beside it")


if __name__ == "__main__":
    main()
