"""One load in a process of its own; the parent watches its memory from outside.

Arguments: the checkpoint, the scheme, `LoadOptions` as JSON, which may hold a `policy`, and optionally a tiny
checkpoint to warm up on. Prints `ready`, waits for a line, loads, prints the report as JSON and waits for another line.
Logs go to standard error.
"""

from __future__ import annotations

import gc
import json
import logging
import sys

from quantload import LoadOptions, QuantizationPolicy, load_quantized


def main() -> None:
    path, scheme, given, *warm_up = sys.argv[1:]
    options = json.loads(given)
    policy = QuantizationPolicy.from_mapping(options.pop("policy", {"linear": scheme}))
    for tiny in warm_up:
        load_quantized(tiny, scheme)
    gc.collect()
    logger = logging.getLogger("quantload")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    print("ready", flush=True)
    sys.stdin.readline()
    model = load_quantized(path, scheme, policy=policy, options=LoadOptions.from_mapping(options))
    print(json.dumps(model.load_report.to_dict()), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
