"""One load in a process of its own; the parent watches its memory from outside.

Arguments: the checkpoint, the scheme, `LoadOptions` as JSON, which may hold a `policy` and `through_transformers`, and
optionally a tiny checkpoint to warm up on. Prints `ready`, waits for a line, loads, prints the report as JSON and waits
for another line. Logs go to standard error.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from typing import Any

from quantload import LoadOptions, QuantizationPolicy, QuantloadConfig, load_quantized
from transformers import AutoModelForCausalLM


def through_transformers(
    path: str, scheme: str, policy: QuantizationPolicy | None = None, options: LoadOptions | None = None
) -> Any:
    config = QuantloadConfig(scheme, policy=policy, options=options, progress=False)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def main() -> None:
    path, scheme, given, *warm_up = sys.argv[1:]
    options = json.loads(given)
    policy = QuantizationPolicy.from_mapping(options.pop("policy", {"linear": scheme}))
    load = through_transformers if options.pop("through_transformers", False) else load_quantized
    for tiny in warm_up:
        load(tiny, scheme)
    gc.collect()
    logger = logging.getLogger("quantload")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    print("ready", flush=True)
    sys.stdin.readline()
    model = load(path, scheme, policy=policy, options=LoadOptions.from_mapping(options))
    print(json.dumps(model.load_report.to_dict()), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
