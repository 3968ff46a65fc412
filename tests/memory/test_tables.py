"""Tables say in any width what they say where there is room: nothing is cut, and no name is taken for markup."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantload import LoadOptions, LoadReport, QuantizationPolicy, cli, load_quantized, plan_quantized
from quantload.memory.amounts import format_bytes
from quantload.memory.summary import render
from quantload.schemes.listing import print_schemes
from rich.console import Console

LONG = (
    "model.layers.[bold].a_module_with_a_name_that_is_longer_than_any_terminal_is_wide_and_has_no_spaces_in_it.up_proj"
)
POLICY = QuantizationPolicy(ignore=("re:model[.]layers.[bold]*[0-1].*q_proj",))
WIDE, NARROW = 10_000, (120, 80, 60, 40)
LINES = "\u2500\u2501\u2502\u2503\u2513\u250f\u2533\u2521\u2547\u2529\u2514\u2534\u2518"


def printed(show: Callable[[Console], object], width: int) -> str:
    to = io.StringIO()
    show(Console(file=to, width=width))
    return to.getvalue()


def letters(text: str) -> Counter[str]:
    """Everything but spaces and the lines of tables."""
    return Counter(letter for letter in text if not letter.isspace() and letter not in LINES)


@pytest.fixture(scope="module")
def report() -> LoadReport:
    policy = QuantizationPolicy(ignore=("re:.*layers.[0-1].*q_proj",))
    found = load_quantized(cli.DEMO_MODEL, policy=policy, options=LoadOptions(digest=True)).load_report.to_dict()
    found["layers"][0] |= {"name": LONG, "sqnr_db": 1.0}
    found["kept"][0] |= {"name": LONG, "reason": "because of [red] " + LONG}
    found["unexpected"] = [LONG] * 2
    return LoadReport.from_dict(found)


@pytest.fixture(params=["report", "schemes", "plan"])
def show(request: pytest.FixtureRequest, report: LoadReport) -> Callable[[Console], object]:
    if request.param == "report":
        return lambda to: render(report, to)
    if request.param == "schemes":
        return lambda to: print_schemes("cpu", to)
    return lambda to: printed_plan(to)


def printed_plan(to: Console) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantload.cli.commands.tables", lambda: to)
        patch.setattr("quantload.cli.model_options.PolicyOptions.policy", lambda _: POLICY)
        patch.setattr(sys, "argv", ["quantload", "plan"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code


@pytest.mark.parametrize("width", NARROW)
def test_a_narrow_table_has_every_letter_of_a_wide_one(show: Callable[[Console], object], width: int) -> None:
    wide, narrow = printed(show, WIDE), printed(show, width)
    assert max(map(len, narrow.splitlines())) <= width
    assert "\u2026" not in narrow
    sizes_apart = {letter: count for letter, count in (letters(wide) - letters(narrow)).items() if not letter.isdigit()}
    assert not sizes_apart


def test_a_load_says_in_its_tables_what_it_says_in_json(report: LoadReport) -> None:
    said: dict[str, Any] = report.to_dict()
    wide = printed(lambda to: render(report, to), WIDE)
    for size in ("checkpoint_bytes", "final_bytes", "peak_bytes", "staging_peak_bytes", "baseline_bytes"):
        assert format_bytes(said[size]) in wide
    assert {kept["reason"] for kept in said["kept"]} == {k["reason"] for k in said["kept"] if k["reason"] in wide}
    assert {layer["scheme"] for layer in said["layers"]} == {s["scheme"] for s in said["layers"] if s["scheme"] in wide}
    assert wide.count(LONG) >= 3


def test_a_plan_says_in_its_tables_what_it_says_in_json() -> None:
    draft = plan_quantized(cli.DEMO_MODEL, policy=POLICY)
    wide = printed(printed_plan, WIDE)
    for _, size in draft.plan.memory.sizes():
        assert format_bytes(size) in wide
    reasons = {each.reason for each in draft.assignments if each.reason}
    assert any("[bold]" in reason for reason in reasons)
    assert all(reason in wide for reason in reasons)


def test_where_there_is_no_terminal_tables_are_as_wide_as_they_are(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, report: LoadReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.save(tmp_path / "report.json")
    monkeypatch.setattr(sys, "argv", ["quantload", "report", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit):
        cli.main()
    out = capfd.readouterr().out
    assert letters(out) == letters(printed(lambda to: render(report, to), WIDE))
    assert any(LONG in line for line in out.splitlines())
