"""`bench/pipeline.py` at a tiny scale, and what it concludes from its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pipeline
import pipeline_parts
import pipeline_results
import profile_load
import pytest
from checkpoints import make, make_recipe, shards_of
from quantload.errors import QuantloadError
from recipes import many
from stopwatch import Stopwatch


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench_pipeline")


@pytest.mark.slow
def test_all_of_it_runs_and_writes_what_the_tables_take(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scale", "0.002", "--repeats", "1", "--work", str(work), "--results", str(tmp_path)]
    options += ["--checkpoints", "dense", "--cold-checkpoints", "dense"]
    monkeypatch.setattr(pipeline, "set_page_cache", lambda *_, **__: 1.0)  # a test folder may be on a disk without one
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *options])
    pipeline.main()
    (path,) = tmp_path.glob("pipeline-20*-scale0.002.json")
    result = json.loads(path.read_text())
    assert [goal.met is None for goal in pipeline_results.goals_of(result)] == [False] * 6
    assert {row["checkpoint"] for row in result["many"]} == {"few", "many"}
    assert not (work / "hollow-0.002").exists()
    assert "| dense, 0.0 GB |" in capsys.readouterr().out


def test_a_hollow_checkpoint_takes_no_room_and_can_be_planned(work: Path) -> None:
    folder = make_recipe(many(0.1), work / "hollow", hollow=True)
    files = shards_of(folder)
    assert sum(path.stat().st_size for path in files) > 200e6
    assert sum(path.stat().st_blocks * 512 for path in files) < 2e6
    found = pipeline_parts.plan_alone(folder)
    assert found["tensors"] == len(many(0.1).tensors)
    assert all(found[step] > 0 for step in pipeline_results.INDEX_STEPS)
    assert found["total"] > sum(found[step] for step in pipeline_results.INDEX_STEPS)


def test_what_goes_wrong_in_a_thread_is_raised(work: Path) -> None:
    folder = make("tiny", 0.002, work)
    assert pipeline_parts.read_alone(folder) > 0
    with pytest.raises(LookupError, match="no_such_format"):
        pipeline_parts.quantize_alone(1, "no_such_format")
    with pytest.raises(QuantloadError):
        pipeline_parts.load_whole(folder / "nothing")


def test_a_stopwatch_puts_back_what_it_timed() -> None:
    class Thing:
        def act(self) -> int:
            return 5

    original = Thing.act
    with Stopwatch((Thing, "act")) as watch:
        assert Thing().act() == 5
    assert Thing.act is original
    assert watch.seconds["act"] > 0
    with pytest.raises(AttributeError), Stopwatch((Thing, "act"), (Thing, "gone")):
        pass


RESULT: dict[str, Any] = {
    "warm": [
        {"checkpoint": "dense", "bytes": 3e9, "rates": {"read": 60e9, "quantize": 15e9, "stream": 13e9, "total": 9e9}}
    ],
    "many": [
        {"checkpoint": "few", "bytes": 2e9, "tensors": 66, "seconds": {"total": 1.0, "stream": 0.9}},
        {"checkpoint": "many", "bytes": 1e9, "tensors": 50988, "seconds": {"total": 1.0, "stream": 0.9}},
    ],
    "index": {
        "seconds": {"total": 5.0, "tensors": 101976, "read_index": 1.0, "map_checkpoint": 1.5, "build_routes": 0.6}
    },
    "cold": [{"checkpoint": "moe", "bytes": 3e9, "seconds": {"read": 2.0, "read, drop": 1.0, "load": 1.05}}],
}


def test_goals_say_how_near_the_whole_comes_to_its_parts() -> None:
    reached = {goal.name: (goal.met, goal.reached) for goal in pipeline_results.goals_of(RESULT)}
    assert reached == {
        "warm: >= 12 GB/s": (False, "9.00 GB/s, 25.0% short"),
        "warm: >= 0.8x of the slower part": (False, "0.60x, 25.0% short"),
        "cold: within 1.1x of reading and doing nothing": (True, "1.05x"),
        "50,988 tensors within 1.5x of the same bytes in 66": (False, "2.00x, 33.3% over"),
        "index and routing of 101,976 tensors: < 3 s": (False, "3.10 s, 3.3% over"),
    }


def test_a_reload_is_compared_with_its_parts() -> None:
    (row,) = RESULT["warm"]
    result = {"warm": [{**row, "rates": {**row["rates"], "reload": 10.8e9}}]}
    reached = {goal.name: (goal.met, goal.reached) for goal in pipeline_results.goals_of(result)}
    assert reached["reload: >= 0.9x of reading and quantizing one after the other"] == (True, "0.90x")
    assert "| 9.0 | 0.60 | 0.75 | 10.8 | 0.90 |" in pipeline_results.render_pipeline(result)


def test_tables_show_the_ideal_beside_the_whole() -> None:
    assert "| dense, 3.0 GB | 60.0 | 15.0 | 12.0 | 13.0 | 9.0 | 0.60 | 0.75 |" in pipeline_results.render_pipeline(
        RESULT
    )
    assert "| the rest (building the skeleton) | 1.90 |" in pipeline_results.render_counts(RESULT)


@pytest.mark.parametrize(
    ("stack", "stage"),
    [
        ("load_quantized (loader/load.py:68);PieceReader.run (loader/checkpoint/reader.py:9)", "Python around a read"),
        ("f (threading.py:1);FileSource.read_into (loader/checkpoint/source.py:8);preadv (source.py:1)", "reading"),
        ("x (loader/online/weight_loader.py:3);NumbaKernels.quantize (cpu.py:9)", "quantizing"),
        ("load_quantized (loader/load.py:68);draft_load (loader/load.py:9);f (json/decoder.py:3)", "planning"),
        ("AnonymousRssProbe._run (loader/memory/probes.py:101)", profile_load.ELSEWHERE),
    ],
)
def test_a_stack_belongs_to_its_innermost_stage(stack: str, stage: str) -> None:
    assert profile_load.stage_of(stack).startswith(stage)


def test_call_chains_are_read_and_named() -> None:
    script = [
        " 12.500:",
        "\t ffff clear_page_erms ([kernel.kallsyms])",
        "\t ffff asm_exc_page_fault ([kernel.kallsyms])",
        "\t 7f [unknown] ([JIT] tid 3)",
        "",
        " 13.000:",
        "\t 7f 0x00007f ([JIT] tid 3)",
        "",
        " 13.500:",
        "\t 7f _PyEval_EvalFrameDefault (libpython3.11.so.1.0)",
    ]
    found = [(at, profile_load.part_of(chain)) for at, chain in profile_load.chains(script)]
    parts = ["page faults: finding and clearing new memory", profile_load.COMPILED, profile_load.PYTHON]
    assert found == list(zip([12.5, 13.0, 13.5], parts, strict=True))
