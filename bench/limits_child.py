"""One load under a hard limit of memory, in a process of its own.

Arguments: a JSON object with `path`, `scheme`, `limit` (data, as, cgroup, none), `allowed` (bytes above what the
process has when everything is imported), `warm_up` (a tiny checkpoint, or null), `options` of `LoadOptions`, and for
cgroup the folder `group`, whose limit is set. Prints one JSON object: `outcome`, what the limit was, what was reached.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from quantload import LoadOptions, QuantloadError, load_quantized

MIB = 1 << 20
FIELDS = {"data": "VmData", "as": "VmSize"}
LIMITS = {"data": resource.RLIMIT_DATA, "as": resource.RLIMIT_AS}


def status_bytes(field: str) -> int:
    """A size from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def set_limit(kind: str, allowed: int, group: str | None) -> int:
    """Allow so many bytes above what there is; the bytes that there were."""
    if kind == "none":
        return 0
    if kind == "cgroup":
        assert group is not None
        return join_group(Path(group), allowed)
    before = status_bytes(FIELDS[kind])
    resource.setrlimit(LIMITS[kind], (before + allowed, resource.RLIM_INFINITY))
    return before


def join_group(group: Path, allowed: int) -> int:
    """Go into an empty memory cgroup that may hold so many bytes; what was taken before is charged elsewhere."""
    version_2 = (group / "memory.max").exists()
    (group / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(allowed))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return 0


def main() -> None:
    """Load as the argument says."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    options = LoadOptions.from_mapping(given.get("options", {}))
    if given["warm_up"] is not None:
        load_quantized(given["warm_up"], given["scheme"], device="cpu")
    gc.collect()
    before = set_limit(given["limit"], given["allowed"], given.get("group"))
    told: dict[str, Any] = {"before": before, "allowed": given["allowed"]}
    try:
        model = load_quantized(given["path"], given["scheme"], device="cpu", options=options)
    except QuantloadError as error:
        told |= {"outcome": type(error).__name__, "message": str(error)}
    except BaseException as error:
        told |= {"outcome": f"raw {type(error).__name__}", "message": str(error)}
    else:
        report = model.load_report
        told |= {"outcome": "loaded", "peak_bytes": report.peak_bytes, "final_bytes": report.final_bytes}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
