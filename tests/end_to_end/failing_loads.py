"""Runs loads that do not finish, in a process of its own, and prints as JSON what each leaves behind.

Arguments: a tiny good checkpoint to warm up on, then JSON `[[folder, how], ...]`, where `how` is `plain`, `budget`,
`shrink` (the shard is truncated while it is read) or `interrupt` (Ctrl-C while slow reads go on).
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from process_state import descriptors, status_bytes, threads
from quantload import LoadOptions, load_quantized
from quantload.errors import QuantloadError

real_preadv = os.preadv
calls = itertools.count(1)
interrupted_at = 0.0


def shrinking_preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
    if offset > 16 << 20:
        os.truncate(f"/proc/self/fd/{fd}", offset + 100)
    return real_preadv(fd, buffers, offset, flags)


def interrupted_preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
    """Reads that would take many seconds, and Ctrl-C in the middle of them."""
    global interrupted_at
    if next(calls) == 40:
        interrupted_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return real_preadv(fd, buffers, offset, flags)


PREADV: dict[str, Callable[..., int]] = {"shrink": shrinking_preadv, "interrupt": interrupted_preadv}


def attempt(folder: str, how: str) -> dict[str, Any]:
    options = LoadOptions(chunk_bytes=256 << 10, workers=2, max_memory=50 << 20 if how == "budget" else None)
    os.preadv = PREADV.get(how, real_preadv)
    try:
        load_quantized(folder, "quark_mxfp4", options=options)
    except (QuantloadError, KeyboardInterrupt) as error:
        seconds = time.monotonic() - interrupted_at
        return {"error": type(error).__name__, "message": str(error), "seconds_to_stop": seconds}
    finally:
        os.preadv = real_preadv
    return {"error": None, "message": "the load succeeded"}


def state() -> dict[str, int]:
    gc.collect()
    return {
        "anonymous": status_bytes("RssAnon"),
        "descriptors": len(descriptors()),
        "threads": len(threads()),
        "tasks": len(os.listdir("/proc/self/task")),
    }


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background without one
    warm_up, loads = sys.argv[1], json.loads(sys.argv[2])
    load_quantized(warm_up, "quark_mxfp4")
    results = []
    attempt(*loads[0])  # the first error imports modules of its own
    for folder, how in loads:
        before = state()
        result = attempt(folder, how)
        results.append({**result, "before": before, "after": state()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
