"""What loads, conversions and plans do on a machine that has too little memory, or just enough."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantload import LoadOptions, cli, convert_checkpoint, load_quantized
from quantload.convert import flow
from quantload.errors import MemoryBudgetError
from quantload.fit import check
from quantload.memory.limits import MACHINE, MemoryLimit
from quantload.planning import plan_quantized

Checkpoint = Callable[[str], Path]
KIB = 1 << 10


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the machine have so many bytes, and no more."""

    def set_to(nbytes: int) -> None:
        for module in (check, flow):
            monkeypatch.setattr(module, "memory_limits", lambda: [MemoryLimit(MACHINE, nbytes, 0, False)])

    return set_to


def test_a_load_that_cannot_fit_reads_no_weight_and_is_done_by_force(
    checkpoint: Checkpoint, available: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    path, read = checkpoint("llama"), list[int]()
    plan = plan_quantized(path, "mxfp8").plan.memory
    smallest = plan_quantized(path, "quark_mxfp4").plan.memory
    available(plan.final_bytes - 1)
    with pytest.raises(MemoryBudgetError, match=r"^the load does not fit: needs .*; smallest that does: \w+ at \d"):
        load_quantized(path, "mxfp8", progress=lambda done, _: read.append(done))
    assert not any(read)
    assert load_quantized(path, "mxfp8", options=LoadOptions(force=True)).load_report.layers
    assert "Memory: does not fit: needs" in caplog.text
    assert smallest.final_bytes < plan.final_bytes


@pytest.mark.parametrize(("short", "level", "said"), [(0, logging.INFO, "fits: "), (1, logging.WARNING, "tight: ")])
def test_a_load_goes_on_with_a_verdict_in_its_log_where_it_may_fit(
    checkpoint: Checkpoint, available: Callable[[int], None], caplog: pytest.LogCaptureFixture, short: int, level: int,
    said: str,
) -> None:  # fmt: skip
    path = checkpoint("llama")
    available(plan_quantized(path).plan.memory.peak_bytes - short)
    with caplog.at_level(logging.INFO, "quantload"):
        load_quantized(path)
    found = [(each.levelno, each.message) for each in caplog.records if each.message.startswith("Memory: ")]
    assert [(each[0], said in each[1]) for each in found] == [(level, True)]


def test_a_conversion_needs_its_arena_only(
    checkpoint: Checkpoint, available: Callable[[int], None], tmp_path: Path
) -> None:
    path, options = checkpoint("llama"), LoadOptions(workers=1)
    arena = 3 * (1 << 20)
    available(arena - 1)
    convert_checkpoint(path, tmp_path / "out", "quark_mxfp4", options=options)  # its pages are counted when written to

    def mapped() -> list[MemoryLimit]:
        return [MemoryLimit("the address space", arena - 1, 0, is_virtual=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "memory_limits", mapped)
        with pytest.raises(MemoryBudgetError, match=r"^the conversion does not fit: .*\(the address space allows"):
            convert_checkpoint(path, tmp_path / "other", "quark_mxfp4", options=options)
        assert not (tmp_path / "other").exists()
        forced = LoadOptions(workers=1, force=True)
        convert_checkpoint(path, tmp_path / "other", "quark_mxfp4", options=forced)
    assert (tmp_path / "other").exists()


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["quantload", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_plan_ends_with_the_verdict_and_exit_code_4(
    checkpoint: Checkpoint, available: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = checkpoint("llama")
    available(10 * KIB)
    code, out, _ = run(monkeypatch, capsys, "plan", path)
    assert (code, "peak" in out) == (4, True)
    assert out.splitlines()[-1].startswith("does not fit: needs 6")
    assert out.splitlines()[-1].endswith("MiB"), out
    assert "; no scheme does: the smallest, " in out
    code, out, _ = run(monkeypatch, capsys, "plan", path, "--json")
    assert code == 4
    assert json.loads(out)["verdict"]["fits"] is False
    monkeypatch.setenv("QUANTLOAD_FORCE", "1")
    code, out, _ = run(monkeypatch, capsys, "plan", path)
    assert (code, "does not fit" in out) == (0, True)
    available(1 << 40)
    monkeypatch.delenv("QUANTLOAD_FORCE")
    code, out, _ = run(monkeypatch, capsys, "plan", path)
    assert (code, out.splitlines()[-1].partition(": ")[0]) == (0, "fits")


def test_load_ends_with_exit_code_4_and_a_limit_of_the_user_counts_by_force_too(
    checkpoint: Checkpoint, available: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = checkpoint("llama")
    available(10 * KIB)
    code, _, err = run(monkeypatch, capsys, "load", path)
    assert (code, "error: the load does not fit" in err) == (4, True)
    assert run(monkeypatch, capsys, "load", path, "--force")[0] == 0
    available(1 << 40)
    code, _, err = run(monkeypatch, capsys, "load", path, "--force", "--max-memory", "1MiB")
    assert (code, "the limit is 1.000 MiB" in err) == (4, True)


def test_what_comes_on_top_of_the_peak_is_said(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint("llama")

    def beside(*arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run(monkeypatch, capsys, "plan", path, "--json", *arguments)[1])
        return found["beside_the_peak"]  # type: ignore[no-any-return]

    context = json.loads((path / "config.json").read_text())["max_position_embeddings"]
    sizes = beside()
    assert sizes["process_bytes"] > 50 << 20
    assert sizes["attention_cache_tokens"] == context
    assert beside("--context", "10")["attention_cache_bytes"] == sizes["attention_cache_bytes"] * 10 // context
    assert beside("--requests", "3")["attention_cache_bytes"] == sizes["attention_cache_bytes"] * 3
    _, out, _ = run(monkeypatch, capsys, "plan", path, "--context", "1000")
    assert "attention cache of one sequence of 1,000 tokens" in out
    assert "of 2 sequences of" in run(monkeypatch, capsys, "plan", path, "--requests", "2")[1]
    path = checkpoint("bert")
    assert beside()["attention_cache_bytes"] is None
    assert "attention cache" not in run(monkeypatch, capsys, "plan", path)[1]
