"""All there is to learn about the kernels and loads on a GPU, in the minutes that there is one, worth first.

1. right: every kernel of every format against the torch reference; failures with their smallest inputs;
2. loads: the demo model under every scheme, and two checkpoints of 3 GB, against the same loads on the CPU;
3. speed: quantizing, products and whole loads against copies and BF16;
4. deeper: profiles of a load and of a decode, other tile sizes for the slowest kernels.

    python bench/gpu_day.py --minutes 8 --out day
    python bench/gpu_day.py --dry --out day            # the same on the CPU, tiny: that the script still works

Needs torch, triton, transformers, numba, hypothesis and what they bring; quantload need not be installed. Every stage
is a process of its own with a limit of time, which writes its JSON as it goes: what was found before it ended, was
ended or took the device down with it, is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_day_package import package_in_place

STAGES = ("right", "loads", "speed", "deeper")


def parser() -> argparse.ArgumentParser:
    """The options; `--stage` is for the processes that this one starts."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    made.add_argument("--dry", action="store_true", help="everything on the CPU, on tiny sizes")
    made.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    made.add_argument("--work", type=Path, help="where checkpoints are made (default DIR/work, removed in the end)")
    made.add_argument("--stage", choices=(*STAGES, "checkpoints"), help=argparse.SUPPRESS)
    made.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 1 when something is wrong, 2 when there is no GPU."""
    options = parser().parse_args(arguments)
    options.out = options.out.resolve()
    options.work = (options.work or options.out / "work").resolve()
    with package_in_place():
        if options.stage is not None:
            from gpu_day_stages import run_stage

            return run_stage(options)
        from gpu_day_run import run_day

        return run_day(options)


if __name__ == "__main__":
    sys.exit(main())
