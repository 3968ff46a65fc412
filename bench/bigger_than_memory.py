"""Load a checkpoint larger than the machine's memory as MXFP4: Qwen3-30B-A3B's shapes, 57 GiB of BF16.

Makes the checkpoint (seeded random weights, the published configuration, one tensor an expert and projection, 16
shards), reads its files in two ways and does nothing, loads it in a process of its own, reads the files again, and
removes the checkpoint, also when it is interrupted; what a killed run left is removed by the next one. The page cache
is emptied of the files before each of these. Says so and ends where the disk has too little room.

    python bench/bigger_than_memory.py
    python bench/bigger_than_memory.py --layers 2             # 2.9 GiB, a quick look
    python bench/bigger_than_memory.py --keep --dir /big/disk # leave the checkpoint there; later runs find it
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import DISK_MARGIN, WORK_FOLDER, make, make_recipe, missing_bytes, shards_of
from goals import Goal, at_most, print_goals
from load_process import Limits, Run, run_loader, set_page_cache, touch_memory
from loaders import LOADERS
from machine import describe_machine, headline
from markdown import markdown
from recipes import Recipe, qwen3_30b
from result_files import RESULTS, write_result

GIB, GB = 1 << 30, 1e9
LAYERS = 48
PREFIX = "bigger_than_memory"
OWNER, KEPT = "owner", "kept"
SCHEME = "quark_mxfp4"
FLOORS = {
    "read-only": "reading the files, doing nothing",
    "read-drop": "the same, dropping from the page cache what was read",
}
PEAK_GOAL = 16.1
"""GiB. SGLang publishes 15.975 GiB final for this model under a limit of 17 GiB, which does not see transients."""
COLD_GOAL = 1.1
MEMORY_SHARE = 0.85
"""Of what is free: where a load is stopped before the machine kills something at random."""
WARM_UP_SCALE = 0.002
TOUCH_SHARE = {"floor": 1.0, "quantload": 0.4, "peer": 1.0}
"""Of the checkpoint: memory touched before a run, as far as there is any; a raw read fills the page cache."""


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def remove_stale(folder: Path) -> None:
    """Remove what earlier runs left in `folder`, unless its process still runs or it was to be kept."""
    for left in folder.glob(f"{PREFIX}-*"):
        owner = left / OWNER
        number = owner.read_text() if owner.exists() else ""
        if (left / KEPT).exists() or (number.isdigit() and _alive(int(number))):
            continue
        _note(f"removing {left}, left by a run that was killed")
        shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


@contextmanager
def checkpoint(recipe: Recipe, folder: Path, keep: bool) -> Iterator[Path]:
    """The checkpoint, made now or kept by an earlier run; removed in the end unless it is to be kept.

    SIGTERM and SIGHUP end the block as Ctrl-C does.
    """
    layers = recipe.config["num_hidden_layers"]
    kept = folder / f"{PREFIX}-{layers}-layers"
    home = kept if keep or (kept / KEPT).exists() else folder / f"{PREFIX}-{layers}-layers-{os.getpid()}"
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / OWNER).write_text(str(os.getpid()))
        if keep:
            (home / KEPT).touch()
        yield make_recipe(recipe, home / "checkpoint", drop=True)
    finally:
        if not (home / KEPT).exists():
            shutil.rmtree(home, ignore_errors=True)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def available_bytes() -> int:
    """Memory the kernel says a new program could have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line; this benchmark needs Linux")


class Bench:
    """Reads, loads and reads again."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.files = shards_of(folder)
        self.size = sum(path.stat().st_size for path in self.files)
        self.options = options
        self.available = available_bytes()
        self.limits = Limits(options.timeout, options.generate_timeout, int(MEMORY_SHARE * self.available))

    def scene(self, touch: int) -> dict[str, Any]:
        """Just before a run: nothing of the files in the page cache, and free memory that the machine really has."""
        rate = touch_memory(min(touch, int(MEMORY_SHARE * available_bytes())))
        return {"cached_before": set_page_cache(self.files, cold=True), "first_touch_bytes_per_second": rate}

    def run(self, loader: str, python: str = sys.executable, generate: bool = False) -> Run:
        """One loader in a process of its own."""
        family = LOADERS[loader].family
        warm_up = make("moe", WARM_UP_SCALE, self.folder.parent) if family != "floor" else None
        run = run_loader(
            python,
            loader,
            self.folder,
            warm_up=warm_up,
            limits=self.limits,
            generate=generate,
            before_load=lambda: self.scene(int(TOUCH_SHARE[family] * self.size)),
        )
        seconds = run.facts.get("seconds")
        _note(f"{loader}: {run.detail or run.status if seconds is None else f'{seconds:.1f} s'}")
        return run

    def all(self) -> dict[str, Any]:
        """The load between two raw reads, then the peers asked for; facts of every run."""
        runs = [(floor, self.run(floor)) for floor in FLOORS]
        runs.append((SCHEME, self.run(SCHEME, generate=not self.options.no_generate)))
        runs += [(floor, self.run(floor)) for floor in FLOORS]
        for peer in self.options.peers:
            runs.append((peer, self.run(peer, self.options.peers_python)))
        return {
            "checkpoint_bytes": self.size,
            "available_bytes": self.available,
            "runs": [{"loader": name, **run.to_dict()} for name, run in runs],
        }


def raw_seconds(result: dict[str, Any]) -> float | None:
    """The faster way of reading and doing nothing: the mean of before and after the load, seconds."""
    found = {name: [r["seconds"] for r in result["runs"] if r["loader"] == name and "seconds" in r] for name in FLOORS}
    return min((sum(values) / len(values) for values in found.values() if values), default=None)


def _load(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(run for run in result["runs"] if run["loader"] == SCHEME)
    return found


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """Peak memory, and the time against reading and doing nothing."""
    load, raw = _load(result), raw_seconds(result)
    if "seconds" not in load:
        return [Goal(f"peak <= {PEAK_GOAL} GiB", "Qwen3-30B-A3B", False, load["detail"] or load["status"])]
    ratio = load["seconds"] / raw if raw else None
    peak = max(load["report"]["peak_bytes"], load["peak_anon"]) / GIB
    return [
        at_most(f"peak <= {PEAK_GOAL} GiB (anonymous, above the start)", "Qwen3-30B-A3B", peak, PEAK_GOAL, " GiB"),
        at_most(f"cold: within {COLD_GOAL}x of reading and doing nothing", "Qwen3-30B-A3B", ratio, COLD_GOAL, "x"),
    ]


def render(result: dict[str, Any]) -> str:
    """What the load took, and what every other loader did."""
    load, size = _load(result), result["checkpoint_bytes"]
    lines = [
        ["checkpoint", f"{size / GIB:.2f} GiB of BF16, {result['layers']} layers"],
        ["memory of the machine", f"{result['machine']['memory_bytes'] / GIB:.1f} GiB"],
    ]
    for run in result["runs"]:
        if run is load:
            lines += _load_lines(load, size)
        else:
            seconds = run.get("seconds")
            done = run["detail"] or run["status"] if seconds is None else _speed(size, seconds)
            lines.append([FLOORS.get(run["loader"], f"`{run['loader']}`"), done])
    return markdown(lines, ("", "Qwen3-30B-A3B as MXFP4"))


def _speed(size: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {size / seconds / GB:.2f} GB/s"


def _load_lines(load: dict[str, Any], size: int) -> list[list[str]]:
    if "seconds" not in load:
        return [["**the load**", load["detail"] or load["status"]]]
    report, generated = load["report"], load.get("generate")
    total = load["baseline"]["total"] + load["peak_total"]
    lines = [
        ["**the load**", f"**{_speed(size, load['seconds'])}**"],
        ["processor time", f"{load['user_seconds']:.1f} s user, {load['system_seconds']:.1f} s system"],
        ["peak above the start, anonymous: quantload's report", f"**{report['peak_bytes'] / GIB:.3f} GiB**"],
        ["the same, sampled from outside every 3 ms", f"{load['peak_anon'] / GIB:.3f} GiB"],
        ["peak of everything resident (`VmHWM`), start-up and libraries included", f"{total / GIB:.3f} GiB"],
        ["predicted peak", f"{report['predicted_peak_bytes'] / GIB:.3f} GiB"],
        ["final: all parameters and buffers", f"{load['final_bytes'] / GIB:.3f} GiB"],
        ["staging arena", f"{report['staging_peak_bytes'] / GIB:.3f} GiB"],
        ["modules quantized", f"{load['layers_quantized']:,}"],
    ]
    shares = [f"{kind} {share:.0%}" for kind, share in load["quantized"].items() if share is not None]
    lines.append(["weights quantized", ", ".join(shares)])
    if generated is not None:
        good = f"{len(generated['tokens'])} tokens in {generated['seconds']:.1f} s" if generated["ok"] else "NO"
        lines.append(["generates", "; ".join([good, *generated["problems"]])])
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model; fewer is a quick look (default 48)")
    parser.add_argument("--dir", type=Path, default=WORK_FOLDER, help="where the checkpoint is made")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there for the next run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-generate", action="store_true", help="skip the eight tokens")
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=sorted(LOADERS), metavar="LOADER", help="run these too"
    )
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for the peers (default: this)")
    parser.add_argument("--timeout", type=float, default=1800, help="limit of one load (seconds)")
    parser.add_argument("--generate-timeout", type=float, default=600, help="limit for the eight tokens (seconds)")
    return parser.parse_args()


def main() -> None:
    """Make, read, load, read, remove; print the table and goals, write the dated JSON."""
    options = _arguments()
    options.dir.mkdir(parents=True, exist_ok=True)
    recipe = qwen3_30b(options.layers)
    remove_stale(options.dir)
    kept = options.dir / f"{PREFIX}-{options.layers}-layers" / KEPT
    if not kept.exists() and missing_bytes(recipe, options.dir):
        free = shutil.disk_usage(options.dir).free
        print(
            f"skipped: {options.dir} has {free / GIB:.1f} GiB free, the checkpoint needs"
            f" {(recipe.tensor_bytes + DISK_MARGIN) / GIB:.1f} GiB; free some or give another --dir"
        )
        return
    machine = describe_machine()
    print(headline(machine))
    start = time.perf_counter()
    with checkpoint(recipe, options.dir, options.keep) as folder:
        seconds = time.perf_counter() - start
        _note(f"made {recipe.tensor_bytes / GB:.1f} GB in {seconds:.0f} s")
        measured = Bench(folder, options).all()
    result = {"machine": machine, "layers": options.layers, "making_seconds": seconds, **measured}
    print(f"\n{render(result)}")
    print_goals(goals_of(result))
    reduced = "" if options.layers == LAYERS else f"{options.layers}-layers"
    print(f"\nwritten: {write_result('bigger_than_memory', result, options.results, reduced)}")


if __name__ == "__main__":
    main()
