"""What `--sensitivity` measures on a text: nothing of the model is changed in the end, and `--fit` chooses by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload import LoadOptions, load_quantized, plan_quantized
from quantload.cli import DEMO_MODEL, app
from quantload.draft import plan_draft
from quantload.errors import PolicyError, UnsupportedCheckpointError
from quantload.fit import sensitivity
from quantload.fit.expected_loss import SENSITIVITY, group_name, items_of
from quantload.fit.policy import fit_policy
from quantload.fit.sensitivity import measure_sensitivity
from quantload.kernels.nl4_levels import LEVELS
from quantload.options import QuantizationPolicy
from typer.testing import CliRunner

TEXT = Path(__file__).parent.parent / "data" / "stdlib_validation.txt"
GROUPS = {group_name(*key) for key in SENSITIVITY if key[0] in ("qkv", "o", "experts")}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_quantized(DEMO_MODEL, "nl4", device="cpu", progress=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, float]]]:
    """A short text, and what was measured on it."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT.read_text()[:1500])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "WINDOW", 64)
        yield text, measure_sensitivity(DEMO_MODEL, text, device="cpu", progress=False)


def test_exchanged_codes_are_neighbours_and_come_back() -> None:
    codes = torch.randint(0, 256, (3, 50_001), dtype=torch.uint8).view(-1)
    before = codes.clone()
    noise, signal = sensitivity._exchange(codes, 7, counting=True)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    now, then = (torch.cat([levels[(each & 15).long()], levels[(each >> 4).long()]]) for each in (codes, before))
    assert noise == float((now - then).square().sum())
    assert signal == float(then.square().sum())
    assert float((now != then).double().mean()) == pytest.approx(sensitivity.EXCHANGED / 256, rel=0.1)
    assert float((now - then).abs().max()) <= 19
    assert sensitivity._exchange(codes, 7, counting=False) == (0.0, 0.0)
    assert torch.equal(codes, before)


def test_the_error_is_that_of_the_weights_with_their_scales(model: Any) -> None:
    layer = model.model.layers[2].self_attn.o_proj

    def values() -> torch.Tensor:
        layout = layer.scheme.layouts(layer)["weight"]
        out = torch.empty(layout.rows, layout.columns)
        layer.scheme.kernels.dequantize(layer.scheme.weight(layer, layout, "weight"), out)
        return out.double()

    before = values()
    with sensitivity._exchanged([layer]) as error:
        changed = values()
    assert torch.equal(values(), before)
    assert error == pytest.approx(float((changed - before).square().sum() / before.square().sum()), rel=0.15)


def test_every_kind_is_measured_and_the_model_is_as_before(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sensitivity._measured(model, [torch.arange(2, 66)[None]])
    assert set(found) == GROUPS
    assert all(value > 0 for value in found.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name


def test_each_module_is_measured_and_counts_before_its_kind(model: Any) -> None:
    found = sensitivity._measured(model, [torch.arange(2, 66)[None]], each=True)
    assert set(found) == {f"model.layers.{layer} {kind}" for layer in range(7) for kind in ("qkv", "o", "experts")}
    assert all(value > 0 for value in found.values())
    draft = plan_draft(DEMO_MODEL, "nl4", device="cpu", policy=QuantizationPolicy(), options=LoadOptions())
    given = {"model.layers.0 qkv": 7.0, "qkv first": 3.0}
    losses = {item.name: item.loss for item in items_of(draft, None, given)}
    assert set(losses) == set(found)
    assert [losses[f"model.layers.{layer} qkv"] for layer in range(3)] == [7.0, 1.0, 1.0]


def test_predictions_that_are_kept_in_part_give_the_divergence_of_all(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = torch.arange(2, 40)[None]
    with torch.inference_mode():
        whole, bases = sensitivity._log_probabilities(model, window), {}
        for kept in (1 << 20, 256):
            monkeypatch.setattr(sensitivity, "KEPT", kept)
            bases[kept] = sensitivity._predicted(model, window)
        with sensitivity._exchanged([model.model.layers[0].mlp.experts]):
            now = sensitivity._log_probabilities(model, window)
            exact = (whole.exp() * (whole - now)).sum(-1)
            for base in bases.values():
                found = sensitivity._divergence(model, window, base)
                assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=0.2)


def test_what_was_measured_is_read_the_next_time(
    measured: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, found = measured
    assert set(found) == GROUPS
    (kept,) = text.parent.glob("text.txt.*.json")
    assert json.loads(kept.read_text()) == found

    def load(*_: object, **__: object) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(sensitivity, "load_quantized", load)
    assert measure_sensitivity(DEMO_MODEL, text) == found
    with pytest.raises(AssertionError):  # for each module it was not
        measure_sensitivity(DEMO_MODEL, text, each=True)
    other = tmp_path / "text.txt"
    other.write_text(text.read_text() + "x")
    shutil.copy(kept, tmp_path)
    with pytest.raises(AssertionError):
        measure_sensitivity(DEMO_MODEL, other)
    for wrong in ("[1]", "{", '{"qkv first": "x"}'):
        kept.with_name("wrong.json").write_text(wrong)
        with pytest.raises(PolicyError, match="has no sensitivities"):
            sensitivity.read_sensitivity(kept.with_name("wrong.json"))


def test_fit_chooses_by_what_was_measured() -> None:
    smallest = plan_quantized(DEMO_MODEL, "nl4", device="cpu").plan.memory.peak_bytes
    size = smallest + (300 << 10)
    odd = dict.fromkeys(GROUPS, 1e-06) | {"o last": 5.0}
    options = LoadOptions(fit=size, fit_sensitivity=odd)
    fitted = fit_policy(DEMO_MODEL, size, device="cpu", options=options)
    raised = {row.kind + " " + row.third for row in fitted.rows if row.scheme == "none"}
    assert "o last" in raised
    assert fitted.rows != fit_policy(DEMO_MODEL, size, device="cpu").rows
    report = load_quantized(DEMO_MODEL, options=options, device="cpu", progress=False).load_report
    assert report.fit == fitted.report()
    assert report.fit.sensitivity == odd
    draft = plan_draft(DEMO_MODEL, "nl4", device="cpu", policy=QuantizationPolicy(), options=LoadOptions())
    (item,) = [each for each in items_of(draft, None, odd) if each.names == ("model.layers.6.self_attn.o_proj",)]
    assert item.loss == 2.5


def test_the_command_measures_for_the_size(measured: tuple[Path, dict[str, float]]) -> None:
    text, found = measured
    arguments = ["plan", "--device", "cpu", "--json", "--sensitivity", str(text)]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    assert CliRunner().invoke(app, ["plan", "--fit", "1GiB", "--sensitivity-each"]).exit_code != 0
    size = plan_quantized(DEMO_MODEL, "mxfp6_e2m3", device="cpu").plan.memory.peak_bytes
    told = json.loads(CliRunner().invoke(app, [*arguments, "--fit", f"{size}B"]).stdout)
    assert told["fit"]["sensitivity"] == found


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    golden = Path(__file__).parent.parent / "data" / "golden" / "quark_qwen3moe_mxfp4"
    for model, text, message in (
        (DEMO_MODEL, short, "tokens; sensitivity needs 64"),
        (DEMO_MODEL, tmp_path / "none.txt", "cannot be read"),
        (golden, TEXT, "quantized already"),
    ):
        with pytest.raises(PolicyError, match=message):
            measure_sensitivity(model, text, device="cpu")
    with pytest.raises(PolicyError, match="give a size, too"):
        LoadOptions(fit_sensitivity={"qkv first": 1.0})
    with pytest.raises(PolicyError, match="give what was measured"):
        LoadOptions(fit="auto", fit_sensitivity={"qkv first": -1.0})


def test_encoders_have_no_predictions(checkpoint: Any) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="sensitivity is measured on texts that go on"):
        measure_sensitivity(checkpoint("bert"), TEXT, device="cpu")
