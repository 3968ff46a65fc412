"""Runs loads that fail, in a process of its own, and prints as JSON what each leaves behind.

Arguments: a tiny good checkpoint to warm up on, then JSON `[[folder, how], ...]`, where `how` is `plain`, `shrink`
(the shard is truncated while it is read) or `budget`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

from process_state import descriptors, status_bytes, threads
from quantload import LoadOptions, load_quantized
from quantload.errors import QuantloadError

real_preadv = os.preadv


def shrinking_preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
    if offset > 16 << 20:
        os.truncate(f"/proc/self/fd/{fd}", offset + 100)
    return real_preadv(fd, buffers, offset, flags)


def attempt(folder: str, how: str) -> tuple[str, str]:
    options = LoadOptions(chunk_bytes=1 << 20, workers=2, max_memory=50 << 20 if how == "budget" else None)
    os.preadv = shrinking_preadv if how == "shrink" else real_preadv
    try:
        load_quantized(folder, "quark_mxfp4", options=options)
    except QuantloadError as error:
        return type(error).__name__, str(error)
    finally:
        os.preadv = real_preadv
    return "", "no error"


def state() -> dict[str, Any]:
    gc.collect()
    return {
        "anonymous": status_bytes("RssAnon"),
        "descriptors": len(descriptors()),
        "threads": len(threads()),
        "tasks": len(os.listdir("/proc/self/task")),
    }


def main() -> None:
    warm_up, loads = sys.argv[1], json.loads(sys.argv[2])
    load_quantized(warm_up, "quark_mxfp4")
    results = []
    attempt(*loads[0])  # the first error imports modules of its own
    for folder, how in loads:
        before = state()
        kind, message = attempt(folder, how)
        results.append({"error": kind, "message": message, "before": before, "after": state()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
