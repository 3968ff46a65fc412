"""Runs `rank_program.py` as so many processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "rank_program.py"
SECONDS = 240
"""After which ranks that wait for each other for ever are ended; none of the tests comes near it."""


def run_ranks(ranks: int, folder: Path, **said: Any) -> list[dict[str, Any] | None]:
    """What each rank found; None for one that ended without a word."""
    meeting, results = folder / "meeting", [folder / f"{rank}.json" for rank in range(ranks)]
    command = [sys.executable, str(PROGRAM)]
    started = [
        subprocess.Popen([*command, str(rank), str(ranks), str(meeting), str(result), json.dumps(said)])
        for rank, result in enumerate(results)
    ]
    try:
        for process in started:
            process.wait(SECONDS)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads(result.read_text()) if result.exists() else None for result in results]
