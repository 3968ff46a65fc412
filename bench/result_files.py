"""Where benchmarks leave their dated results, and how the newest ones are found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS, reduced: str = "") -> Path:
    """Write `result`, which has `machine`, to `NAME-DATE[-reduced].json` and return the path; nothing is overwritten.

    `reduced` says how a run was smaller than the full one; the tables of the README leave such results out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{result['machine']['date'][:10]}" + (f"-{reduced}" if reduced else "")
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    path.write_text(json.dumps({**result, "reduced": reduced}, indent=1) + "\n")
    return path


def results_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All full-size results of a benchmark, newest first; each gets its file's name as `file`."""
    found = []
    for path in sorted(folder.glob(f"{name}-20*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if not result.get("reduced") and result.get("settings", {}).get("scale", 1) == 1:
            found.append({**result, "file": path.name})
    return sorted(found, key=lambda result: str(result["machine"]["date"]), reverse=True)


def newest(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest full-size result of a benchmark, or None."""
    return next(iter(results_of(name, folder)), None)
