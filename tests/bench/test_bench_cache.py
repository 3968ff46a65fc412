"""`bench/cache.py`: what it runs, and what it concludes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cache as bench
import pytest


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "set_page_cache", lambda *_, **__: 0.0)  # a test folder may be on a disk without one
    work, results = tmp_path / "work", tmp_path / "results"
    command = ["bench", "--scale", "0.002", "--rounds", "1", "--dir", str(work), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    (path,) = results.glob("cache-20*-scale0.002.json")
    result = json.loads(path.read_text())
    assert [run["kind"] for run in result["runs"]] == ["plain", "written", "hit", "raw"]
    assert result["entry_bytes"] > result["runs"][2]["bytes_read"] > 0
    assert "from the entry" in capsys.readouterr().out
    assert not (work / "cache").exists()


def test_goals_compare_medians() -> None:
    sizes = {"final_bytes": 1 << 30, "staging_peak_bytes": 1 << 20, "peak_bytes": (1 << 30) + (5 << 20), "cache": None}
    seconds = {"plain": [8.0, 9.0, 10.0], "written": [10.0, 12.0, 11.0], "hit": [3.0, 2.0, 100.0], "raw": [1.0]}
    runs = [{"kind": kind, "seconds": each, **sizes} for kind, times in seconds.items() for each in times]
    goals = bench.goals_of({"checkpoint": "moe", "runs": runs})
    assert [(goal.met, goal.reached) for goal in goals] == [
        (True, "3.67x"),
        (True, "3.00x"),
        (True, "1.22x"),
        (True, "4.00 MiB beside them"),
    ]
