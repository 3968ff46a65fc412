"""The default scheme on every architecture: all of it quantized, computing what its codes stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import raw_checkpoint
import torch
from architectures import ALL, TOKENS, Architecture, generate, named, quantizable_modules, reference
from quantized_models import (
    assert_logits_match,
    final_bytes,
    must_be_quantized,
    quantized_modules,
    weight_names,
)
from quantload import load_quantized
from transformers import PreTrainedModel

Checkpoint = Callable[[str], Path]
everywhere = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)


@pytest.fixture(scope="module")
def load(checkpoint: Checkpoint) -> Callable[[Architecture], PreTrainedModel]:
    """The quantized model of an architecture, loaded once; tests only read it."""
    models: dict[str, PreTrainedModel] = {}

    def quantized(architecture: Architecture) -> PreTrainedModel:
        if architecture.name not in models:
            models[architecture.name] = load_quantized(checkpoint(architecture.name), "quark_mxfp4")
        return models[architecture.name]

    return quantized


Load = Callable[[Architecture], PreTrainedModel]


@everywhere
def test_every_linear_and_experts_module_is_quantized(
    architecture: Architecture, checkpoint: Checkpoint, load: Load
) -> None:
    model = load(architecture)
    original = reference(checkpoint(architecture.name), architecture)
    required, forbidden = must_be_quantized(original, architecture)
    assert required

    quantized = quantized_modules(model)
    assert required <= set(quantized), f"left in high precision: {sorted(required - set(quantized))}"
    assert not forbidden & set(quantized)

    report = model.load_report.to_dict()
    assert {layer["name"] for layer in report["layers"]} == set(quantized)
    reasons = {kept["name"]: kept["reason"] for kept in report["kept"]}
    for name, _ in quantizable_modules(original):
        assert name in quantized or reasons.get(name), f"{name} has neither a scheme nor a reason"
    assert not set(reasons) & set(quantized)


@everywhere
def test_logits_are_those_of_the_dequantized_weights(
    architecture: Architecture, checkpoint: Checkpoint, load: Load
) -> None:
    assert_logits_match(load(architecture), checkpoint(architecture.name), architecture)


@pytest.mark.parametrize("architecture", [a for a in ALL if a.generates], ids=lambda a: a.name)
def test_generates(architecture: Architecture, load: Load) -> None:
    inputs = architecture.inputs()
    output = generate(load(architecture), inputs, 16)
    rows, prompt = inputs["input_ids"].shape
    assert output.shape == (rows, (1 if "decoder_input_ids" in inputs else prompt) + 16)


@everywhere
def test_kept_weights_are_untouched(architecture: Architecture, checkpoint: Checkpoint, load: Load) -> None:
    model = load(architecture)
    original = reference(checkpoint(architecture.name), architecture).state_dict()
    state = model.state_dict()
    quantized = quantized_modules(model)
    own = {f"{name}.{weight}" for name, module in quantized.items() for weight in ("weight", *module._parameters)}
    kept = [name for name in original if name not in own or name.endswith("bias")]
    assert len(kept) > 3
    for name in kept:
        assert state[name].dtype == original[name].dtype, name
        assert torch.equal(state[name], original[name]), name


@everywhere
def test_report_counts_the_real_bytes(architecture: Architecture, checkpoint: Checkpoint, load: Load) -> None:
    model = load(architecture)
    path = checkpoint(architecture.name)
    report = model.load_report
    assert report.final_bytes == final_bytes(model)
    stored = raw_checkpoint.read(path)
    data_bytes = sum(tensor.nbytes for tensor in stored.values())
    file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert data_bytes <= report.checkpoint_bytes <= file_bytes
    assert data_bytes <= report.bytes_read <= file_bytes + data_bytes // 10
    assert report.peak_bytes >= 0
    assert report.staging_peak_bytes > 0
    assert report.seconds > 0
    assert report.predicted_final_bytes == pytest.approx(report.final_bytes, rel=0.02)
    original = reference(path, architecture)
    for layer in report.to_dict()["layers"]:
        module = original.get_submodule(layer["name"])
        weights = [module.get_parameter(name) for name in weight_names(module)]
        assert layer["kind"] == ("experts" if weights[0].ndim == 3 else "linear")
        assert layer["scheme"] == "quark_mxfp4"
        assert layer["numel"] == sum(weight.numel() for weight in weights), layer["name"]
        assert layer["bytes_in"] >= layer["numel"] * architecture.dtype.itemsize, layer["name"]
        assert layer["bytes_out"] < layer["bytes_in"] or layer["numel"] < 4096, layer["name"]


@pytest.mark.parametrize(
    "architecture",
    named("llama", "llama_odd", "qwen3_moe", "qwen3_moe_odd", "gpt_oss", "gpt2", "nomic_bert", "qwen3_moe_float32"),
    ids=lambda a: a.name,
)
def test_report_statistics_are_those_of_the_weights(
    architecture: Architecture, checkpoint: Checkpoint, load: Load
) -> None:
    model = load(architecture)
    original = reference(checkpoint(architecture.name), architecture)
    quantized = quantized_modules(model)
    for layer in model.load_report.to_dict()["layers"]:
        name = layer["name"]
        twin = original.get_submodule(name)
        weights = [twin.get_parameter(weight).detach().double().flatten() for weight in weight_names(twin)]
        values = [quantized[name].dequantize(weight).double().flatten() for weight in weight_names(twin)]
        exact, approximate = torch.cat(weights), torch.cat(values)
        error = exact - approximate
        sqnr = 10 * math.log10(float(exact.square().sum() / error.square().sum()))
        assert layer["sqnr_db"] == pytest.approx(sqnr, abs=0.02), name
        assert 15 < sqnr < 25, name
        assert layer["amax"] == pytest.approx(float(exact.abs().max()), rel=1e-6), name
        assert layer["max_abs_error"] == pytest.approx(float(error.abs().max()), rel=1e-4), name
        zeros = float((approximate == 0).double().mean())
        assert layer["zero_fraction"] == pytest.approx(zeros, abs=1e-6), name
        assert 0 <= layer["saturated_fraction"] < 0.2, name


def test_auto_is_quark_mxfp4(checkpoint: Checkpoint) -> None:
    report = load_quantized(checkpoint("llama")).load_report
    assert report.quantization == "quark_mxfp4"
    assert {layer["scheme"] for layer in report.to_dict()["layers"]} == {"quark_mxfp4"}


@pytest.mark.parametrize("architecture", named("llama_odd", "qwen3_moe_odd"), ids=lambda a: a.name)
def test_odd_sizes_are_padded_only_inside(architecture: Architecture, load: Load) -> None:
    """K = 80, 112, 48, 40: what is stored is padded to whole blocks, what comes out is not."""
    model = load(architecture)
    for name, module in quantized_modules(model).items():
        for parameter in module.parameters(recurse=False):
            assert parameter.ndim < 2 or parameter.shape[-1] > 0, name
    assert generate(model, architecture.inputs(), 4).shape == (TOKENS[0], TOKENS[1] + 4)
