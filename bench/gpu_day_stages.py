"""One stage of `gpu_day.py`, in the process that was started for it."""

from __future__ import annotations

import argparse
import sys

import torch
from gpu_day_record import DeviceLost, Record, first_line

LOST = 3
"""The exit status of a process whose device can do nothing more: another one may go on."""


def run_stage(options: argparse.Namespace) -> int:
    """Run the stage; what it raises beside is in its JSON as `error`."""
    if options.stage == "checkpoints":
        from gpu_day_loads import make_checkpoints

        make_checkpoints(options.work, options.dry)
        return 0
    device = torch.device("cpu") if options.dry else torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    name = f"right-{options.share.replace('/', 'of')}" if options.stage == "right" else options.stage
    record = Record(options.out / f"{name}.json")
    try:
        if options.stage == "right":
            from gpu_day_right import run
        elif options.stage == "loads":
            from gpu_day_loads import run
        elif options.stage == "speed":
            from gpu_day_speed import run
        else:
            from gpu_day_deeper import run
        run(record, device, options)
    except DeviceLost as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return LOST
    except Exception as error:
        record.values["error"] = first_line(error)
        raise
    else:
        record.values["done"] = True
    finally:
        record.write()
    return 0
