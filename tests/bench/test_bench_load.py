"""What `bench/load.py` concludes from its runs, and how it counts bytes and watches a process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import load_child
import load_process
import pytest
import torch
from goals import Goal
from load_process import Limits, Run
from load_results import Goals, Row, summarize
from loaders import LOADERS

MIB = 1 << 20
LIMITS = Limits(load_seconds=120, generate_seconds=120, memory_bytes=8 << 30)


def row(loader: str, seconds: float, checkpoint: str = "dense", cold: bool = False, **more: Any) -> Row:
    report = {
        "staging_peak_bytes": 32 * MIB,
        "predicted_final_bytes": 1000 * MIB,
        "predicted_peak_bytes": 1020 * MIB,
    }
    facts: dict[str, Any] = {"linear_share": 1.0, "final_bytes": 1000 * MIB, "peak_anon": 1010 * MIB}
    facts |= {"checkpoint_pages_after": 0, "report": report, **more}
    return Row(checkpoint, loader, cold, "ok", "", 1, seconds, checkpoint_bytes=3_000_000_000, **facts)


def goal(rows: list[Row], start: str) -> Goal:
    (found,) = [goal for goal in Goals(rows).all() if goal.name.startswith(start)]
    return found


@pytest.mark.parametrize(
    ("more", "met"),
    [
        ({}, True),
        ({"peak_anon": 1097 * MIB}, False),
        ({"checkpoint_pages_after": 100 * MIB}, False),
        ({"report": None}, None),
    ],
)
def test_memory_goal(more: dict[str, Any], met: bool | None) -> None:
    assert goal([row("quark_mxfp4", 0.5, **more)], "quark_mxfp4: peak").met is met


@pytest.mark.parametrize(
    ("final", "peak", "met"), [(1010, 1020, True), (1030, 1020, False), (970, 1020, False), (1000, 1009, False)]
)
def test_plan_goal(final: int, peak: int, met: bool) -> None:
    report = {"staging_peak_bytes": 0, "predicted_final_bytes": final * MIB, "predicted_peak_bytes": peak * MIB}
    assert goal([row("quark_mxfp4", 0.5, report=report)], "quark_mxfp4: plan").met is met


def test_speed_is_compared_with_the_fastest_peer_that_quantized_everything() -> None:
    rows = [
        row("int8_per_channel", 1.0, "moe", expert_share=1.0),
        row("torchao-int8", 0.9, "moe", expert_share=0.0),
        row("torchao-int8-experts", 9.0, "moe", expert_share=1.0),
        row("torchao-float8-experts", 4.5, "moe", expert_share=1.0),
        row("bitsandbytes-nf4", 1.0, "moe", expert_share=1.0),
    ]
    found = goal(rows, "int8_per_channel: >= 4x")
    assert found.met
    assert found.reached == "4.5x (torchao-float8-experts)"


def test_a_goal_without_a_peer_is_unknown_and_says_why() -> None:
    killed = Row("dense", "torchao-mxfp4", False, "killed", "needs more than 18.0 GB of anonymous memory", 1)
    found = goal([row("quark_mxfp4", 0.5), killed], "quark_mxfp4: >= 20x")
    assert found.met is None
    assert "needs more than 18.0 GB" in found.reached


@pytest.mark.parametrize(("seconds", "met"), [(1.09, True), (1.11, False)])
def test_cold_goal_is_relative_to_reading(seconds: float, met: bool) -> None:
    rows = [row("read-only", 1.0, cold=True), row("quark_mxfp4", seconds, cold=True)]
    assert goal(rows, "quark_mxfp4: cold").met is met


def test_a_row_takes_the_median_time_the_worst_memory_and_the_first_failure() -> None:
    runs = [Run("ok", "", {"seconds": s, "peak_anon": p, "final_bytes": 5}) for s, p in ((3.0, 7), (1.0, 9), (2.0, 8))]
    summed = summarize("dense", "none", False, 4_000_000_000, runs)
    assert (summed.seconds, summed.peak_anon, summed.rate) == (2.0, 9, 2e9)
    failed = summarize("dense", "none", False, 1, [*runs, Run("timeout", "over 9 s")])
    assert (failed.status, failed.detail, failed.seconds) == ("timeout", "over 9 s", None)


def test_shared_storages_count_once_and_views_whole() -> None:
    base = torch.zeros(1000, dtype=torch.uint8)
    assert load_child.storage_bytes(iter([base, base[:10], torch.zeros(5, dtype=torch.float32)])) == 1020


def test_page_cache_state_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    path.write_bytes(bytes(4 * MIB))
    load_process.read_files([path])
    assert load_process.cached_share([path]) == 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("moe", 0.002, tmp_path_factory.mktemp("bench_load"))


@pytest.mark.slow
def test_a_process_tells_time_memory_and_what_it_quantized(folder: Path) -> None:
    run = load_process.run_loader(sys.executable, "quark_mxfp4", folder, limits=LIMITS)
    assert run.status == "ok", run.detail
    assert run.facts["quantized"] == {"linear": 1.0, "expert": 1.0}
    assert run.facts["final_bytes"] == run.facts["report"]["final_bytes"]
    assert run.facts["peak_anon"] > 0
    assert run.facts["checkpoint_pages_after"] == 0


def test_a_load_over_the_memory_limit_is_stopped(folder: Path) -> None:
    limits = Limits(load_seconds=120, generate_seconds=120, memory_bytes=-1)
    run = load_process.run_loader(sys.executable, "read-only", folder, limits=limits)
    assert (run.status, "anonymous memory" in run.detail) == ("killed", True)


def test_a_load_over_its_time_is_stopped(folder: Path) -> None:
    limits = Limits(load_seconds=0, generate_seconds=120, memory_bytes=8 << 30)
    run = load_process.run_loader(sys.executable, "read-only", folder, limits=limits)
    assert (run.status, run.detail) == ("timeout", "over 0 s")


def test_a_missing_library_is_named() -> None:
    loader = replace(LOADERS["torchao-int8"], modules=("json", "no_such_library.part"))
    assert loader.missing() == ["no_such_library.part"]


def test_an_interpreter_that_cannot_start_is_reported_with_its_last_words(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such interpreter >&2\nexit 3\n")
    broken.chmod(0o755)
    run = load_process.run_loader(str(broken), "read-only", folder, limits=LIMITS)
    assert (run.status, run.detail) == ("failed", "exit code 3: no such interpreter")
