"""`bench/engines.py`: what it makes of what its loads say; one load of it without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
from quantload.cli import DEMO_MODEL

MIB = 1 << 20


def facts(**changed: Any) -> dict[str, Any]:
    return {
        "engine": "vLLM 1", "seconds": 2.0, "cpu_seconds": 3.0, "peak_anon_bytes": 150 * MIB,
        "peak_file_bytes": 7 * MIB, "final_bytes": 100 * MIB, "packed_bytes": 0,
        "quantized_share": 0.5, "tokens": [[1, 2, 3], [4, 5, 6]],
        **changed,
    }  # fmt: skip


def test_a_row_is_the_median_of_its_runs_and_an_error_where_one_failed() -> None:
    row = engines.summary([facts(seconds=1.0), facts(seconds=9.0), facts()])
    assert (row["seconds"], row["tokens"]) == (2.0, [[1, 2, 3], [4, 5, 6]])
    assert engines.summary([facts(), {"error": "no"}])["error"] == "no"


def test_tokens_count_up_to_the_first_that_differs() -> None:
    ours = next(way for way in engines.WAYS if way.like)
    rows = {ours.name: facts(tokens=[[1, 2, 9], [4, 5, 6]]), ours.like: facts()}
    assert engines.same_tokens(ours, rows) == "5 of 6"
    assert engines.same_tokens(ours, {ours.name: {"error": "no"}, ours.like: facts()}) == "-"


def test_the_goal_is_the_bound_of_a_load() -> None:
    bounded = [way for way in engines.WAYS if way.bounded]
    packed = facts(peak_anon_bytes=250 * MIB, packed_bytes=100 * MIB)
    rows = {bounded[0].name: packed, bounded[1].name: facts(peak_anon_bytes=200 * MIB)}
    goals = engines.goals_of({"huge": rows, "moe": {bounded[0].name: {"error": "no"}}})
    assert [(goal.checkpoint, goal.met) for goal in goals] == [("huge", True), ("huge", False), ("moe", None)]
    assert engines.table({**rows, engines.WAYS[0].name: {"error": "no such engine"}})[0][1] == "failed"


def test_what_a_process_says_last_is_why_there_is_no_result(tmp_path: Path) -> None:
    found = engines.run(engines.Way("x", "vllm", {}), tmp_path, sys.executable)
    assert found["error"].split(":")[0] in ("ModuleNotFoundError", "ImportError", "OSError", "ValueError")


@pytest.mark.slow
def test_a_load_without_an_engine() -> None:
    way = next(way for way in engines.WAYS if way.kind == "quantload")
    found = engines.run(way, DEMO_MODEL, sys.executable)
    assert 0.5 < found["quantized_share"] < 1, found
    assert [len(tokens) for tokens in found["tokens"]] == [16, 16]
    assert found["peak_anon_bytes"] > 0


def test_its_help() -> None:
    script = Path(engines.__file__)
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert "--vllm-python" in done.stdout
