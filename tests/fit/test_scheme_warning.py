"""One warning of a scheme that is expected to hurt, which names what is better at that size."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from quantload import QuantizationPolicy, load_quantized, plan_quantized
from quantload.cli import app
from quantload.fit import warning
from typer.testing import CliRunner

Checkpoint = Callable[[str], Path]


@pytest.fixture
def dense(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dense model, counted as one of those that it is said of."""
    monkeypatch.setattr(warning, "FEWEST", 1)
    return checkpoint("llama")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [each.message for each in caplog.records if each.levelno == logging.WARNING and "to hurt" in each.message]
    caplog.clear()
    return found


def test_a_load_and_a_plan_say_it_once(dense: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantload")
    load_quantized(dense, "quark_mxfp4", device="cpu", progress=False)
    (said,) = warnings(caplog)
    assert said.startswith("quark_mxfp4 is expected to hurt a dense model of 0.0")
    assert "nl4 takes as much and is expected to lose 0.46 times that (-q nl4)" in said
    plan_quantized(dense, "quark_mxfp4", device="cpu")
    assert warnings(caplog) == [said]
    told = json.loads(CliRunner().invoke(app, ["plan", str(dense), "--device", "cpu", "--json"]).stdout)
    assert told["scheme_warning"] == said


@pytest.mark.parametrize("scheme", ["nl4", "mxfp6_e2m3", "none"])
def test_better_schemes_are_not_warned_of(dense: Path, scheme: str) -> None:
    assert warning.scheme_warning(plan_quantized(dense, scheme, device="cpu")) is None


def test_only_what_is_better_with_the_same_scales_is_named(dense: Path) -> None:
    policy = QuantizationPolicy(scale_mode="mse")
    for scheme, instead in (
        ("quark_mxfp4", "weights: int4_per_group takes as much"),
        ("int4_per_group", "weights; compare says"),
    ):
        said = warning.scheme_warning(plan_quantized(dense, scheme, policy=policy, device="cpu"))
        assert said is not None
        assert instead in said


def test_experts_and_toys_are_not_meant(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warning.scheme_warning(plan_quantized(checkpoint("llama"), "quark_mxfp4", device="cpu")) is None
    monkeypatch.setattr(warning, "FEWEST", 1)
    moe = plan_quantized(checkpoint("qwen3_moe_odd"), "quark_mxfp4", device="cpu")
    assert warning.scheme_warning(moe) is None
