"""How near a whole load comes to what its parts can do, whatever the tensors' sizes and the state of the page cache.

Four parts, each with its sides taking turns in one process; figures are medians:

- warm: reading alone with all workers, quantizing a hot piece alone with all workers, the whole load as MXFP4, and a
  reload of the same into its memory, on a checkpoint of 3 GB and on one of 11 GB, where what a load costs once weighs
  less;
- many: the same bytes in 51,000 tensors and in 66;
- index: planning a checkpoint of 102,000 tensors, of which only the headers exist;
- cold: the whole load against reading the same files and doing nothing (leaving what was read in the page cache, or
  dropping it behind as the load does), each after dropping them from the page cache.

    python bench/pipeline.py
    python bench/pipeline.py --parts warm --checkpoints dense --repeats 3
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make, make_recipe, shards_of
from goals import print_goals
from load_process import set_page_cache, touch_memory
from loaders import LOADERS
from machine import describe_machine, headline
from pipeline_parts import load_whole, plan_alone, quantize_alone, read_alone
from pipeline_results import PARTS, goals_of, render_counts, render_pipeline
from recipes import many
from result_files import RESULTS, write_result

WARM_UP_SCALE = 0.002
WARM_CHECKPOINTS, COLD_CHECKPOINTS = ("dense", "large"), ("dense", "moe")
TOUCH_SHARE = 0.5
"""Of the checkpoint: memory that is touched and freed before a load; MXFP4 takes less than this."""


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


class Bench:
    """Runs the parts with the options of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def make(self, name: str) -> Path:
        """The checkpoint at the size asked for, and the process warmed up for its architecture."""
        load_whole(make(name, WARM_UP_SCALE, self.options.work))
        return make(name, self.options.scale, self.options.work)

    def load_warm(self, folder: Path, again: bool = False) -> dict[str, float]:
        """One whole load from a warm page cache, free memory touched just before; `again`: and a reload of it."""
        files = shards_of(folder)
        set_page_cache(files, cold=False)
        touch_memory(max(1 << 20, int(TOUCH_SHARE * _size(folder))))
        return load_whole(folder, again=again)

    def warm(self) -> list[dict[str, Any]]:
        """Reading alone, quantizing alone, the whole load, and the same weights once more into the same memory."""
        rows = []
        for name in self.options.checkpoints:
            folder = self.make(name)
            size, turns = _size(folder), []
            for number in range(self.options.repeats):
                set_page_cache(shards_of(folder), cold=False)
                turn = {"read": read_alone(folder), "quantize": quantize_alone(size)}
                turn |= {key: size / seconds for key, seconds in self.load_warm(folder, again=True).items()}
                turns.append(turn)
                rates = ", ".join(f"{key} {rate / 1e9:.1f}" for key, rate in turn.items())
                _note(f"warm {name} {number + 1}: {rates} GB/s")
            rows.append({"checkpoint": name, "bytes": size, "rates": _medians(turns), "turns": turns})
            self.remove_large(name, folder)
        return rows

    def remove_large(self, name: str, folder: Path) -> None:
        """Give the disk space of the 11 GB checkpoint back unless it shall stay."""
        if name == "large" and not self.options.keep:
            shutil.rmtree(folder)

    def many(self) -> list[dict[str, Any]]:
        """The whole load of many small tensors and of few large ones."""
        folders = {name: self.make(name) for name in ("few", "many")}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
        for _ in range(self.options.repeats):
            for name, folder in folders.items():
                turns[name].append(self.load_warm(folder))
                _note(f"many, {name}: {turns[name][-1]['total']:.3f} s")
        rows = []
        for name, folder in folders.items():
            facts = {"bytes": _size(folder), "tensors": plan_alone(folder)["tensors"]}
            rows.append({"checkpoint": name, **facts, "seconds": _medians(turns[name]), "turns": turns[name]})
        return rows

    def index(self) -> dict[str, Any]:
        """Planning 102,000 tensors."""
        load_whole(make("many", WARM_UP_SCALE, self.options.work))
        recipe = many(layers=max(1, round(66 * self.options.scale)))
        folder = make_recipe(recipe, self.options.work / f"hollow-{self.options.scale:g}", hollow=True)
        turns = [plan_alone(folder) for _ in range(self.options.repeats)]
        shutil.rmtree(folder)
        return {"seconds": _medians(turns), "turns": turns}

    def cold(self) -> list[dict[str, Any]]:
        """The whole load, and reading the same bytes and doing nothing, from a cold page cache."""
        rows = []
        for name in self.options.cold_checkpoints:
            folder = self.make(name)
            sides: dict[str, Callable[[], float]] = {
                "read": partial(_seconds, LOADERS["read-only"].build(), folder),
                "read, drop": partial(_seconds, LOADERS["read-drop"].build(), folder),
                "load": partial(_load_seconds, folder),
            }
            turns: list[dict[str, float]] = []
            for number in range(self.options.repeats):
                order = list(sides) if number % 2 == 0 else list(sides)[::-1]  # a disk that tires hits both alike
                turn = {}
                for side in order:
                    touch_memory(max(1 << 20, int(TOUCH_SHARE * _size(folder))))
                    set_page_cache(shards_of(folder), cold=True)
                    turn[side] = sides[side]()
                turns.append(turn)
                _note(f"cold {name}: " + ", ".join(f"{side} {seconds:.2f} s" for side, seconds in turn.items()))
            rows.append({"checkpoint": name, "bytes": _size(folder), "seconds": _medians(turns), "turns": turns})
        return rows


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in shards_of(folder))


def _seconds(run: Callable[[Path], object], folder: Path) -> float:
    start = time.perf_counter()
    run(folder)
    return time.perf_counter() - start


def _load_seconds(folder: Path) -> float:
    return load_whole(folder)["total"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--checkpoints", nargs="+", choices=WARM_CHECKPOINTS, default=list(WARM_CHECKPOINTS))
    parser.add_argument("--cold-checkpoints", nargs="+", choices=("dense", "moe"), default=list(COLD_CHECKPOINTS))
    parser.add_argument("--scale", type=float, default=1.0, help="size relative to the full checkpoints (default 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="where the checkpoints are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="leave the 11 GB checkpoint where it is")
    return parser.parse_args()


def main() -> None:
    """Run the parts, print tables and goals, write the dated JSON."""
    options = _arguments()
    machine = describe_machine()
    print(headline(machine))
    if machine["load_average"][0] > 1:
        _note("warning: the machine is not idle; its best is not in these numbers")
    bench = Bench(options)
    result: dict[str, Any] = {"machine": machine, "repeats": options.repeats, "settings": {"scale": options.scale}}
    for part in options.parts:
        result[part] = getattr(bench, part)()
    print("\n" + "\n\n".join(filter(None, (render_pipeline(result), render_counts(result)))))
    print_goals(goals_of(result))
    whole = set(options.checkpoints) >= set(WARM_CHECKPOINTS) and set(options.cold_checkpoints) >= set(COLD_CHECKPOINTS)
    reduced = f"scale{options.scale:g}" if options.scale != 1 else "" if whole else "part"
    print(f"\nwritten: {write_result('pipeline', result, options.results, reduced)}")


if __name__ == "__main__":
    main()
