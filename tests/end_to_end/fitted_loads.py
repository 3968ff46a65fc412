"""Loads that choose their schemes for a size, each in a process that may have no more memory than that.

The argument is a JSON object: `path`, `options` of the loads, and `loads`, pairs of the size to choose for and the
bytes that may be had beside what the process has, which the kernel holds it to (RLIMIT_DATA). Each load is in a fork of
this process, which has imported everything and loaded nothing. Prints a JSON object a line for each.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from process_state import status_bytes
from quantload import LoadOptions, QuantloadError, load_quantized


def load(path: str, options: dict[str, Any], size: int) -> dict[str, Any]:
    """What came of a load."""
    try:
        given = LoadOptions.from_mapping(options | {"fit": size})
        report = load_quantized(path, device="cpu", options=given, progress=False).load_report
    except QuantloadError as error:
        return {"error": type(error).__name__, "message": str(error)}
    assert report.fit is not None
    return {
        "chosen_bytes": report.fit.final_bytes,
        "final_bytes": report.final_bytes,
        "peak_bytes": report.peak_bytes,
        "predicted_peak_bytes": report.predicted_peak_bytes,
        "schemes": sorted({layer.scheme for layer in report.layers}),
    }


def main() -> None:
    """Load as often as the argument says."""
    given = json.loads(sys.argv[1])
    for size, allowed in given["loads"]:
        child = os.fork()
        if child == 0:
            had = status_bytes("VmData")
            resource.setrlimit(resource.RLIMIT_DATA, (had + allowed, had + allowed))
            told = load(given["path"], given["options"], size)
            print(json.dumps({"size": size, "allowed": allowed, **told}), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
