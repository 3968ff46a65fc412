"""`quantload compare`: the sizes of plans, the errors of weights, and what `--fit` would make of the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantload import LoadOptions, QuantizationPolicy, load_quantized, plan_quantized
from quantload.checkpoint.resolve import resolve
from quantload.cli import DEMO_MODEL, app
from quantload.draft import plan_draft
from quantload.errors import PolicyError
from quantload.fit.comparing import compare_schemes
from quantload.fit.expected_loss import ERRORS, items_of
from quantload.fit.samples import sampled_errors
from quantload.schemes.registry import ENTRIES
from typer.testing import CliRunner

Checkpoint = Callable[[str], Path]


def test_every_scheme_has_the_sizes_of_its_plan_and_nearly_the_error_of_its_load() -> None:
    found = {each.scheme: each for each in compare_schemes(DEMO_MODEL, device="cpu").schemes}
    assert set(found) == {entry.name for entry in ENTRIES}
    sizes = [each.final_bytes for each in found.values()]
    assert sizes == sorted(sizes)
    for name in ("nl4", "none"):
        planned = plan_quantized(DEMO_MODEL, name, device="cpu").plan.memory
        assert (found[name].final_bytes, found[name].peak_bytes) == (planned.final_bytes, planned.peak_bytes)
    for name, error in ERRORS.items():
        assert found[name].error == pytest.approx(error, rel=0.05)
    layers = load_quantized(DEMO_MODEL, "quark_int4fp8_moe", device="cpu", progress=False).load_report.layers
    noise = sum(10 ** (-(layer.sqnr_db or 0.0) / 10) * layer.numel for layer in layers)
    error = noise / sum(layer.numel for layer in layers)
    assert found["quark_int4fp8_moe"].error == pytest.approx(error, rel=0.05)


def test_what_fits_the_same_is_expected_to_lose_no_more() -> None:
    found = compare_schemes(DEMO_MODEL, device="cpu")
    assert found.sampled == 1.0
    best = float("inf")
    for each in found.schemes:
        best = min(best, each.expected_loss if each.scheme in ERRORS and each.fit_loss is not None else best)
        assert each.fit_loss is None or each.fit_loss <= best + 1e-12, each.scheme
    assert all(each.fit_loss is not None for each in found.schemes)
    assert (found.schemes[-1].scheme, found.schemes[-1].fit_loss) == ("none", 0.0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe_odd"])
def test_transposed_weights_and_experts_are_sampled_as_they_are_quantized(checkpoint: Checkpoint, name: str) -> None:
    """Of a tiny checkpoint a sample is a whole matrix; the report has the error of each."""
    path = checkpoint(name)
    report = load_quantized(path, "int8_per_channel", device="cpu", progress=False).load_report
    policy = QuantizationPolicy("int8_per_channel")
    draft = plan_draft(path, "auto", device="cpu", policy=policy, options=LoadOptions())
    items = items_of(draft)
    found = sampled_errors(draft, resolve(path), items, ["int8_per_channel", "none"], policy)
    groups = {name: (item.kind, item.third) for item in items for name in item.names}
    assert set(found["int8_per_channel"]) == set(groups.values())
    assert set(found["none"].values()) == {0.0}
    for layer in report.layers:
        assert layer.sqnr_db is not None
        error = found["int8_per_channel"][groups[layer.name]]
        assert 10 ** (-layer.sqnr_db / 10) == pytest.approx(error, rel=0.5)


def test_weights_that_are_not_finite_are_no_samples(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (source,) = checkpoint("llama").glob("*.safetensors")
    tensors = load_file(source)
    name = next(name for name in tensors if name.endswith("0.self_attn.o_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    assert 0 < compare_schemes(tmp_path, ["nl4"], device="cpu").sampled < 1


def test_what_cannot_be_compared_is_refused() -> None:
    golden = Path(__file__).parent.parent / "data" / "golden" / "quark_qwen3moe_mxfp4"
    for arguments, message in (
        ({"model_id": golden}, "this one is quantized already"),
        ({"policy": QuantizationPolicy(experts="nl4")}, "name no other one"),
        (
            {"policy": QuantizationPolicy(scale_mode="mse"), "schemes": ["nl4"]},
            "cannot be loaded in nl4; it can in",
        ),
        ({"schemes": ["nl5"]}, "unknown scheme"),
    ):
        with pytest.raises(PolicyError, match=message):
            compare_schemes(**{"model_id": DEMO_MODEL, "device": "cpu", **arguments})  # type: ignore[arg-type]


def test_the_command_says_the_same_as_a_table_and_as_json() -> None:
    arguments = ["compare", "--schemes", "int8, mxfp4", "--device", "cpu"]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [each["scheme"] for each in told["schemes"]] == ["quark_mxfp4", "int8_per_channel"]
    table = CliRunner().invoke(app, arguments).stdout
    for each in told["schemes"]:
        assert f"{each['expected_loss']:.1e}" in table
    assert "35 int8_per_channel" in table
    assert "100% of them are of a kind of which some were read\n" in table
