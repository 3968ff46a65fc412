"""`--fit`: schemes whose load stays below a size and that are expected to lose the least."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import quantload
from quantload import QuantizationPolicy, load_quantized, plan_quantized
from quantload.cli import app
from quantload.errors import MemoryBudgetError, PolicyError
from quantload.fit_policy import LADDER, Fitted, fit_policy, items_of
from typer.testing import CliRunner

DEMO_MODEL = Path(quantload.__file__).parent / "demo_model"
SCHEMES = [*LADDER]


@pytest.fixture(scope="module")
def peaks() -> Mapping[str, int]:
    """Of the demo model in each scheme of the ladder."""
    return {name: plan_quantized(DEMO_MODEL, name, device="cpu").plan.memory.peak_bytes for name in SCHEMES}


def expected_loss(fitted: Fitted) -> float:
    """Over that of the same modules in the smallest scheme."""
    policy, total, least = fitted.policy, 0.0, 0.0
    chosen = dict(policy.overrides)
    for item in items_of(plan_quantized(DEMO_MODEL, SCHEMES[0], device="cpu")):
        (scheme,) = {chosen.get(name, policy.linear) for name in item.names}
        total, least = total + item.loss * LADDER[scheme], least + item.loss * LADDER[SCHEMES[0]]
    return total / least


@pytest.mark.parametrize("sizes", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sizes_are_kept_to_lose_less_and_less_and_no_more_than_one_scheme_would(
    sizes: int, peaks: Mapping[str, int]
) -> None:
    low, high = peaks[SCHEMES[0]], peaks["none"]
    before = 1.0
    for step in range(sizes):
        size = low + (high - low) * step // (sizes - 1)
        fitted = fit_policy(DEMO_MODEL, size, device="cpu")
        assert fitted.peak_bytes <= size
        planned = plan_quantized(DEMO_MODEL, policy=fitted.policy, device="cpu").plan.memory
        assert planned.peak_bytes == fitted.peak_bytes
        loss = expected_loss(fitted)
        assert loss <= before + 1e-9
        for name, peak in peaks.items():
            assert peak > size or loss <= LADDER[name] / LADDER[SCHEMES[0]] + 1e-9, (step, name)
        before = loss
    assert before == 0.0


def test_everything_stays_as_stored_where_it_fits(peaks: Mapping[str, int]) -> None:
    fitted = fit_policy(DEMO_MODEL, peaks["none"] + (1 << 20), device="cpu")
    assert fitted.policy == QuantizationPolicy(linear="none")
    assert {row.scheme for row in fitted.rows} == {"none"}
    assert [row.share_of_loss for row in fitted.rows] == [0.0] * len(fitted.rows)


def test_what_cannot_fit_is_refused_with_both_numbers(peaks: Mapping[str, int]) -> None:
    with pytest.raises(MemoryBudgetError, match=r"nothing fits: with all modules in nl4, .*MiB, and fit is 64.000 MiB"):
        fit_policy(DEMO_MODEL, "64MiB", device="cpu")
    with pytest.raises(PolicyError, match="fit chooses the schemes"):
        fit_policy(DEMO_MODEL, "1GiB", policy=QuantizationPolicy(experts="mxfp8"), device="cpu")


def test_a_model_is_loaded_as_fitted_twice_the_same(peaks: Mapping[str, int]) -> None:
    given = QuantizationPolicy(ignore=("*.layers.0.*.o_proj",), overrides=(("*.layers.3.*.o_proj", "mxfp8"),))
    size = (peaks[SCHEMES[0]] + peaks["none"]) // 2
    fitted = fit_policy(DEMO_MODEL, size, policy=given, device="cpu")
    assert fitted == fit_policy(DEMO_MODEL, size, policy=given, device="cpu")
    assert fitted.policy.overrides[0] == ("*.layers.3.*.o_proj", "mxfp8")
    report = load_quantized(DEMO_MODEL, policy=fitted.policy, device="cpu", progress=False).load_report
    schemes = {layer["name"]: layer["scheme"] for layer in report.to_dict()["layers"]}
    assert report.final_bytes == fitted.final_bytes
    assert report.peak_bytes <= report.predicted_peak_bytes == fitted.peak_bytes <= size
    assert schemes["model.layers.3.self_attn.o_proj"] == "mxfp8"
    assert "model.layers.0.self_attn.o_proj" not in schemes
    for layer in range(7):
        assert len({schemes.get(f"model.layers.{layer}.self_attn.{name}_proj") for name in "qkv"}) == 1


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    policy = QuantizationPolicy("nl4", "mxfp8", ("a.*",), (("re:b.*c", "none"),), scale_mode="default")
    (tmp_path / "policy.json").write_text(json.dumps(asdict(policy)))
    (tmp_path / "policy.toml").write_text(
        'linear = "nl4"\nexperts = "mxfp8"\nignore = ["a.*"]\n[overrides]\n"re:b.*c" = "none"\n'
    )
    for name in ("policy.json", "policy.toml"):
        assert QuantizationPolicy.from_file(tmp_path / name) == policy
    for text in ("[1]", "{", '{"experts": "nosuch"}', '{"expert": "nl4"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises((PolicyError, quantload.QuantloadError)):
            QuantizationPolicy.from_file(tmp_path / "bad.json")
    with pytest.raises(PolicyError, match="is no policy"):
        QuantizationPolicy.from_file(tmp_path / "missing.json")


def test_the_command_plans_saves_and_takes_what_was_saved(tmp_path: Path, peaks: Mapping[str, int]) -> None:
    size, saved = peaks["mxfp6_e2m3"], tmp_path / "fit.json"
    arguments = ["plan", "--device", "cpu", "--json"]
    fitted = CliRunner().invoke(app, [*arguments, "--fit", f"{size}B", "--save-policy", str(saved)])
    assert fitted.exit_code == 0, fitted.output
    told = json.loads(fitted.stdout)
    assert told["fit"]["peak_bytes"] == told["peak_bytes"] <= size == told["fit"]["size"]
    assert abs(sum(row["share_of_loss"] for row in told["fit"]["rows"]) - 1) < 1e-9
    again = json.loads(CliRunner().invoke(app, [*arguments, "--policy", str(saved)]).stdout)
    assert again["fit"] is None
    assert again["modules"] == told["modules"]
    for wrong in (["--fit", "1GiB", "-q", "nl4"], ["--policy", str(saved), "--experts", "nl4"]):
        assert CliRunner().invoke(app, [*arguments, *wrong]).exit_code != 0
