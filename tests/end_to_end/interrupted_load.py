"""Loads a checkpoint with slow reads and prints what is left after Ctrl-C as JSON.

Arguments: a tiny good checkpoint to warm up on, the checkpoint to load. Prints `reading` once data is being read.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time

from process_state import descriptors, status_bytes, threads
from quantload import LoadOptions, load_quantized

real_preadv = os.preadv
calls = 0


def slow_preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
    global calls
    calls += 1
    if calls == 40:
        print("reading", flush=True)
    time.sleep(0.05)
    return real_preadv(fd, buffers, offset, flags)


def main() -> None:
    load_quantized(sys.argv[1], "quark_mxfp4")
    gc.collect()
    before = status_bytes("RssAnon"), len(descriptors()), len(threads())
    os.preadv = slow_preadv
    kind = "no error"
    try:
        load_quantized(sys.argv[2], "quark_mxfp4", options=LoadOptions(chunk_bytes=256 << 10, workers=2))
    except BaseException as error:
        kind = type(error).__name__
    print("stopped", flush=True)
    gc.collect()
    after = status_bytes("RssAnon"), len(descriptors()), len(threads())
    print(json.dumps({"error": kind, "before": before, "after": after}), flush=True)


if __name__ == "__main__":
    main()
