"""Spoil the files of checkpoints in very many ways: everything is read right or refused with a message that says why.

Each reader runs in child processes, batch by batch; a batch is a function of the seed. Inputs are mutated at the level
of JSON values and of bytes, from real checkpoints of every stored format; those that reach lines of the package which
none did before are mutated further. Faults are: an error that is no `QuantloadError`, one that names neither file nor
field or is longer than a screen, more than 10 s, a child that dies, memory beyond the plan, and values that another
reader does not find.

    python bench/fuzz.py --jobs 2                         # 113,600 inputs; about half an hour on two cores
    python bench/fuzz.py --scale 0.01 --readers header    # a quick look
    python bench/fuzz.py --readers faulty                 # are faults found? every one of these is one
    python bench/fuzz.py --replay FILE                    # one input that a run has kept
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

HANG_SECONDS = 10.0
MIB = 1 << 20
MEMORY_BYTES = 128 * MIB
ADDRESS_BYTES = 24 << 30
LONGEST_MESSAGE = 4100
KEPT = 400
FINDINGS = Path(__file__).resolve().parent / "work" / "fuzz"
COUNTS = {
    "checkpoint": (1_600, 400), "architecture": (1_000, 500), "config": (6_000, 3_000), "header": (48_000, 16_000),
    "index": (26_000, 13_000), "quantization_config": (26_000, 13_000), "generation_config": (2_000, 2_000),
    "tokenizer": (3_000, 500),
}  # fmt: skip
"""Inputs of each reader, and how many of them in a child process."""
FAULTY = {"faulty": (30, 30)}


def make_reader(name: str, folder: Path) -> Any:
    """One of the readers, which may write to `folder`."""
    if name in ("checkpoint", "architecture"):
        from fuzz_checkpoints import ArchitectureReader, CheckpointReader

        return (CheckpointReader if name == "checkpoint" else ArchitectureReader)(folder)
    if name == "faulty":
        from fuzz_faulty import FaultyReader

        return FaultyReader(folder)
    if name == "tokenizer":
        from fuzz_tokenizers import TokenizerReader

        return TokenizerReader(folder)
    from fuzz_readers import READERS

    return READERS[name](folder)


def judge(reader: Any, data: bytes) -> tuple[str, str]:
    """Read one input: `read` or `refused`, or the kind of fault with what there is to say."""
    from fuzz_readers import Wrong
    from quantload.errors import QuantloadError

    try:
        reader.read(data)
    except QuantloadError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE:
            return "message", f"{len(message)} characters: {message[:200]}"
        if not any(name in message for name in reader.names):
            return "message", f"{type(error).__name__}: {message}"
        return "refused", type(error).__name__
    except Wrong as wrong:
        return "wrong", str(wrong)
    except BaseException as error:
        return "raw error", f"{type(error).__name__}: {error}; {_origin(error)}"
    return "read", ""


def _origin(error: BaseException) -> str:
    """The innermost line of the package that an error came through."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/bench/" not in code.co_filename:
            lines.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(lines[:1] + lines[-3:])


class Batch:
    """What a child process does: inputs number `start` to `start + count` of a reader, one JSON line for each fault."""

    def __init__(self, name: str, seed: int, start: int, count: int, progress: Path) -> None:
        self._name, self._start, self._count = name, start, count
        self._rng = random.Random(f"{name} {seed} {start}")
        self._progress = mmap.mmap(os.open(progress, os.O_RDWR), 8)
        self._counts: Counter[str] = Counter()

    def run(self) -> None:
        """Read all inputs; the last line says how many were read, refused and faulty."""
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            reader = make_reader(self._name, Path(folder))
            lines = self._inputs(reader)
        print(json.dumps({"counts": self._counts, "lines": lines}), flush=True)

    def _inputs(self, reader: Any) -> int:
        from fuzz_coverage import NewLines

        slow = getattr(reader, "slow", False)
        corpus, coverage = reader.corpus(), NewLines(f"{os.sep}quantload{os.sep}")
        begun = len(corpus)
        for data in corpus:
            judge(reader, data)  # what a first call opens, imports and compiles is not the input's
        for number in range(self._start, self._start + self._count):
            data, where = reader.mutate(self._rng, self._rng.choice(corpus), corpus)
            self._progress[:] = number.to_bytes(8, "little")
            (FINDINGS / f"{self._name}.{os.getpid()}").write_bytes(data)
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            before = _peak(reset=slow)
            if slow:
                kind, said = judge(reader, data)
            else:
                with coverage:
                    kind, said = judge(reader, data)
            faulthandler.cancel_dump_traceback_later()
            if (more := _peak() - before) > MEMORY_BYTES:
                kind, said = "memory", f"{more:,} bytes; {kind}: {said}"
            if coverage.found and len(corpus) < begun + KEPT and len(data) < MIB:
                corpus.append(data)
            self._counts[kind] += 1
            if kind not in ("read", "refused"):
                keep(self._name, number, data)
                print(
                    json.dumps({"kind": kind, "number": number, "where": where[:200], "said": said[:1000]}), flush=True
                )
        return coverage.total


def keep(name: str, number: int, data: bytes) -> Path:
    """Leave an input to be replayed."""
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{name}-{number}"
    path.write_bytes(data)
    return path


def _peak(reset: bool = False) -> int:
    """The most resident memory so far, or since it was reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # a process inherits `ru_maxrss` from the one that started it, however large
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status does not say VmHWM")


def run_batch(name: str, seed: int, start: int, count: int) -> Iterator[dict[str, Any]]:
    """The lines of a child; one that hangs or dies is a fault, and the rest of its batch goes to another."""
    while count > 0:
        with tempfile.NamedTemporaryFile() as progress:
            progress.write((1 << 60).to_bytes(8, "little"))
            progress.flush()
            arguments = [name, str(seed), str(start), str(count), progress.name]
            child = subprocess.Popen(
                [sys.executable, __file__, "--batch", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            output, errors = child.communicate()
            last = int.from_bytes(Path(progress.name).read_bytes(), "little")
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        yield from lines
        current = FINDINGS / f"{name}.{child.pid}"
        if lines and "counts" in lines[-1]:
            current.unlink(missing_ok=True)
            return
        kind = "hang" if "Timeout" in errors else "died"
        if current.exists():
            current.rename(FINDINGS / f"{name}-{last}")
        if last == 1 << 60:
            raise SystemExit(f"no input of {name} was read: {errors[-2000:]}")
        yield {"kind": kind, "number": last, "where": "", "said": f"exit {child.returncode}: {errors[-1500:]}"}
        counts = Counter(line["kind"] for line in lines)
        yield {"counts": {**counts, kind: 1, "read or refused": last - start - len(lines)}, "lines": 0}
        count -= last + 1 - start
        start = last + 1


def measure(name: str, seed: int, scale: float) -> dict[str, Any]:
    """All inputs of one reader."""
    total, batch = (COUNTS | FAULTY)[name]
    total = max(1, round(total * scale))
    begin, counts, faults, lines = time.perf_counter(), Counter[str](), [], 0
    for start in range(0, total, batch):
        for line in run_batch(name, seed, start, min(batch, total - start)):
            if "counts" in line:
                counts.update(line["counts"])
                lines = max(lines, line["lines"])
            else:
                faults.append(line)
                print(f"  {name} {line['number']}: {line['kind']}: {line['where']}: {line['said'][-600:]}", flush=True)
    seconds = time.perf_counter() - begin
    return {"reader": name, "inputs": total, "counts": counts, "faults": faults, "lines": lines, "seconds": seconds}


def table(results: list[dict[str, Any]]) -> str:
    """Counts of each reader."""
    rows = []
    for result in results:
        counts = result["counts"]
        right = sum(counts[kind] for kind in ("read", "refused", "read or refused"))
        rows.append(
            [result["reader"], f"{result['inputs']:,}", f"{counts['read']:,}", f"{counts['refused']:,}",
             f"{sum(counts.values()) - right:,}", f"{result['lines']:,}", f"{result['seconds']:.0f} s"]
        )  # fmt: skip
    return markdown(rows, ["reader", "inputs", "read right", "refused", "faults", "lines reached", "time"])


def main() -> None:
    """Fuzz what is asked for, print the table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", default=list(COUNTS), choices=list(COUNTS | FAULTY))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="child processes at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--replay", type=Path, help="an input that was kept; its name says its reader")
    parser.add_argument("--batch", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    FINDINGS.mkdir(parents=True, exist_ok=True)
    if options.batch:
        name, seed, start, count, progress = options.batch
        Batch(name, int(seed), int(start), int(count), Path(progress)).run()
        return
    if options.replay:
        with tempfile.TemporaryDirectory() as folder:
            reader = make_reader(options.replay.name.rpartition("-")[0], Path(folder))
            print(*judge(reader, options.replay.read_bytes()), sep=": ")
        return
    machine = describe_machine()
    print(headline(machine))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: measure(name, options.seed, options.scale), options.readers))
    print(table(results))
    reduced = "" if options.scale == 1 and options.readers == list(COUNTS) else "part"
    write_result("fuzz", {"machine": machine, "seed": options.seed, "results": results}, options.results, reduced)
    faults = sum(len(result["faults"]) for result in results)
    print(f"{sum(result['inputs'] for result in results):,} inputs, {faults} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
