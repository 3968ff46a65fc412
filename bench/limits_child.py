"""Loads under hard limits of memory, in a process of its own that starts with nothing but quantload imported.

The argument is a JSON object: `path`, `scheme`, `kinds` (of limits, each tried in turn: as, data, cgroup), `steps`
(bytes that may be had above what there is then; each is a load), `group` (the folder of an empty memory cgroup, or
null). Prints a JSON object a line for each load: the limit, what came of it, and how many bytes of the checkpoint were
read.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from quantload import QuantloadError, load_quantized

FIELDS = {"data": "VmData", "as": "VmSize"}
LIMITS = {"data": resource.RLIMIT_DATA, "as": resource.RLIMIT_AS}


def status_bytes(field: str) -> int:
    """A size from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def set_limit(kind: str, allowed: int, group: str | None) -> None:
    """Allow so many bytes above what there is."""
    if kind == "cgroup":
        assert group is not None
        join_group(Path(group), allowed)
    else:
        resource.setrlimit(LIMITS[kind], (status_bytes(FIELDS[kind]) + allowed, resource.RLIM_INFINITY))


def lift_limit(kind: str) -> None:
    """Let the process have everything again, but for the cgroup, which is the last."""
    if kind in LIMITS:
        resource.setrlimit(LIMITS[kind], (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def join_group(group: Path, allowed: int) -> None:
    """Go into a memory cgroup that may hold so many bytes; what was taken before is charged to the group before."""
    version_2 = (group / "memory.max").exists()
    current = int((group / ("memory.current" if version_2 else "memory.usage_in_bytes")).read_text())
    (group / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(current + allowed))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def load(path: str, scheme: str) -> dict[str, Any]:
    """What came of a load."""
    told: dict[str, Any] = {"bytes_read": 0}

    def progress(done: int, _: int) -> None:
        told["bytes_read"] = done

    try:
        model = load_quantized(path, scheme, device="cpu", progress=progress)
    except QuantloadError as error:
        return told | {"outcome": type(error).__name__, "message": str(error)}
    except Exception as error:
        return told | {"outcome": f"raw {type(error).__name__}", "message": str(error)}
    report = model.load_report
    return told | {"outcome": "loaded", "peak_bytes": report.peak_bytes, "final_bytes": report.final_bytes}


def main() -> None:
    """Load as often as the argument says."""
    given = json.loads(sys.argv[1])
    for kind in given["kinds"]:
        for allowed in given["steps"]:
            gc.collect()
            set_limit(kind, allowed, given["group"])
            told = load(given["path"], given["scheme"])
            lift_limit(kind)
            print(json.dumps({"limit": kind, "allowed": allowed, **told}), flush=True)


if __name__ == "__main__":
    main()
