"""Quantized checkpoints of many architectures: fused, renamed, transposed, with experts, with layers of no scheme."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import raw_checkpoint
import torch
from architectures import ALL, BY_NAME, Architecture, logits
from quantized_copies import METHODS, quantized_copy
from quantized_models import quantized_modules, weight_names
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.errors import CheckpointError, UnsupportedCheckpointError
from quantload.kernels.formats import NVFP4
from quantload.kernels.registry import kernel_set

Checkpoint = Callable[[str], Path]
TRANSPOSED = {"gpt2"}
"""Their matrices are stored [K, N], which codes packed along K cannot be."""


SPLIT = {"nomic_bert"}
"""The model takes one stored matrix apart, and a block of 128 rows lies across the cut."""

CASES = [
    # Quick: blocks, which have to fit what is merged and split, and in turn one of the two that fit everywhere.
    pytest.param(
        architecture,
        method,
        id=f"{architecture.name}-{method}",
        marks=[pytest.mark.slow] if method == ("fp8 rows", "fp8 tensors")[i % 2] else [],
    )
    for i, architecture in enumerate(ALL)
    for method in ("fp8 rows", "fp8 tensors", "fp8 blocks")
    if architecture.name not in TRANSPOSED and (architecture.name not in SPLIT or method != "fp8 blocks")
]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_every_weight_stands_for_what_its_codes_say(
    architecture: Architecture, method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantized, plain = quantized_copy(tmp_path, checkpoint(architecture.name), *METHODS[method])
    got = load_quantized(quantized, options=LoadOptions(chunk_bytes=4096, workers=2))
    want = load_quantized(plain, "none")
    modules, state = quantized_modules(got), got.state_dict()
    assert modules or not got.load_report.layers
    for name, tensor in want.state_dict().items():
        module, _, weight = name.rpartition(".")
        if module in modules and f"{name}_scale" in state:
            assert torch.equal(modules[module].dequantize(weight).to(tensor.dtype), tensor), name
        else:
            assert torch.equal(state[name], tensor), name
    assert got.load_report.final_bytes == got.load_report.predicted_final_bytes
    assert torch.isfinite(logits(got, architecture.inputs())).all()


@pytest.mark.parametrize(("method", "group"), [("awq", 16), ("gptq", 16), ("gptq 64", 64)])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama"])
def test_int4_of_linear_layers_and_of_experts(
    name: str, method: str, group: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Experts of 32 columns, and layers of 96, do not fill a group of 64, or the last one."""
    quantized, plain = quantized_copy(tmp_path, checkpoint(name), *METHODS[method])
    got, want = load_quantized(quantized, options=LoadOptions(chunk_bytes=4096)), load_quantized(plain, "none")
    assert {layer.format for layer in got.load_report.layers} == {f"int4_group{group}_f16"}
    assert {layer.scheme for layer in got.load_report.layers} == {"prequantized"}
    for path, module in quantized_modules(got).items():
        original = want.get_submodule(path)
        for weight in weight_names(original):
            values = original.get_parameter(weight)
            assert torch.equal(module.dequantize(weight).to(values.dtype), values), f"{path}.{weight}"
    architecture = BY_NAME[name]
    assert torch.isfinite(logits(got, architecture.inputs())).all()
    anew = load_quantized(quantized, "quark_mxfp4", options=LoadOptions(chunk_bytes=4096))
    assert {layer.scheme for layer in anew.load_report.layers} == {"quark_mxfp4"}
    state = anew.state_dict()
    for key, tensor in load_quantized(plain, "quark_mxfp4").state_dict().items():
        assert torch.equal(state[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("options", [LoadOptions(), LoadOptions(chunk_bytes=4096)], ids=["whole", "small pieces"])
def test_gptq_of_layers_that_the_model_keeps_the_other_way_round(
    options: LoadOptions, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    gptq, config = METHODS["gptq 64"]

    def turned(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parts, values = gptq(module, weight.T.contiguous())
        return parts, values.T.contiguous()

    quantized, plain = quantized_copy(tmp_path, checkpoint("gpt2"), turned, config)
    got, want = load_quantized(quantized, options=options), load_quantized(plain, "none")
    modules = quantized_modules(got)
    assert {layer.format for layer in got.load_report.layers} == {"int4_group64_f16"}
    assert len(modules) == len(got.load_report.layers) == 8
    for path, module in modules.items():
        values = want.get_submodule(path).weight
        assert torch.equal(module.dequantize().to(values.dtype), values), path
    inputs = BY_NAME["gpt2"].inputs()
    torch.testing.assert_close(logits(got, inputs), logits(want, inputs), rtol=0.05, atol=0.05)
    anew, state = (
        load_quantized(plain, "quark_mxfp4"),
        load_quantized(quantized, "quark_mxfp4", options=options).state_dict(),
    )
    for key, tensor in anew.state_dict().items():
        assert torch.equal(state[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_experts_in_several_formats_are_quantized_anew_and_not_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (rows, by_rows), (blocks, by_blocks) = METHODS["fp8 rows"], METHODS["mxfp8"]
    group = by_rows["config_groups"]["group_0"] | {"targets": [r"re:.*experts\.2\."]}
    config = by_blocks | {
        "format": "mixed-precision",
        "config_groups": {**by_blocks["config_groups"], "group_1": group},
    }

    def quantize(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return (rows if ".experts.2." in module else blocks)(module, weight)

    quantized, plain = quantized_copy(tmp_path, checkpoint("qwen3_moe"), quantize, config)
    got, want = load_quantized(quantized, "quark_mxfp4"), load_quantized(plain, "quark_mxfp4")
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"experts\.\d\.\w+\.weight is mxfp8, .*experts\.2\.\w+\.weight is fp8_channel, .*--quantization",
    ):
        load_quantized(quantized)
    policy = QuantizationPolicy(linear="none", experts="fp8_per_block")
    assert load_quantized(quantized, policy=policy).load_report.layers


@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
def test_columns_in_the_order_of_their_activations_are_refused(
    scheme: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tensors = "model.layers.1.mlp.experts.2.up_proj.g_idx", "model.layers.0.self_attn.q_proj.g_idx"
    quantized, _ = quantized_copy(tmp_path, checkpoint("qwen3_moe"), *METHODS["gptq"])
    for name in tensors:
        stored = raw_checkpoint.read(quantized)
        stored[name] = stored[name].flip(0)
        reordered = raw_checkpoint.write(tmp_path / name, quantized, [stored])
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} does not count groups of 16 .*\(desc_act\)"):
            load_quantized(reordered, scheme)


@pytest.mark.parametrize("method", ["nvfp4", "mxfp8", "fp8 rows", "fp8 tensors", "fp8 blocks"])
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor", "int4_per_group"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_quantizing_anew_gives_the_bytes_of_what_the_codes_stand_for(
    name: str, scheme: str, method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantized, plain = quantized_copy(tmp_path, checkpoint(name), *METHODS[method])
    got = load_quantized(quantized, scheme, options=LoadOptions(chunk_bytes=4096, workers=3))
    want = load_quantized(plain, scheme)
    same = method == "fp8 tensors" and scheme == "fp8_per_tensor"
    assert {layer.scheme for layer in got.load_report.layers} == {"prequantized" if same else scheme}
    for key, tensor in want.state_dict().items():
        other = got.state_dict()[key]
        if not same:
            assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), key


def test_a_config_of_modelopt_in_a_file_of_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantized, _ = quantized_copy(tmp_path, checkpoint("llama"), *METHODS["nvfp4"])
    want = load_quantized(quantized, "quark_mxfp4").state_dict()
    config = json.loads((quantized / "config.json").read_text())
    said = config.pop("quantization_config")
    (quantized / "config.json").write_text(json.dumps(config))
    apart = {"producer": {"name": "modelopt"}, "quantization": {k: v for k, v in said.items() if k != "quant_method"}}
    (quantized / "hf_quant_config.json").write_text(json.dumps(apart))
    got = load_quantized(quantized, "quark_mxfp4").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    convert_checkpoint(quantized, tmp_path / "out", "quark_mxfp4")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert load_quantized(tmp_path / "out").load_report.quantization == "prequantized"


def _inside(said: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    config["text_config"]["quantization_config"] = said


def _compression(said: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    config["compression_config"] = said


def _gptq_file(said: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    own = {name: value for name, value in said.items() if name != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps(own))


def _awq_file(said: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    own = {"w_bit": said["bits"], "q_group_size": said["group_size"], "zero_point": True, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(own))


@pytest.mark.parametrize(
    ("name", "method", "place"),
    [
        ("gemma3", "fp8 blocks", _inside),
        ("qwen3_vl_moe", "fp8 rows", _inside),
        ("llama", "mxfp8", _compression),
        ("llama", "gptq", _gptq_file),
        ("llama", "awq", _awq_file),
    ],
)
def test_a_config_at_every_place_that_tools_have_for_it(
    name: str, method: str, place: Callable[..., None], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantized, _ = quantized_copy(tmp_path, checkpoint(name), *METHODS[method])
    want = load_quantized(quantized)
    config = json.loads((quantized / "config.json").read_text())
    place(config.pop("quantization_config"), config, quantized)
    (quantized / "config.json").write_text(json.dumps(config))
    got, state = load_quantized(quantized), want.state_dict()
    assert got.load_report.layers == want.load_report.layers
    assert got.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key].view(torch.uint8), t.view(torch.uint8)) for key, t in got.state_dict().items())
    assert got.config.to_dict() == want.config.to_dict()
    convert_checkpoint(quantized, tmp_path / "out", "int8_per_channel", policy=QuantizationPolicy(experts="none"))
    written = json.dumps(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert written.count('"quant_method"') == 1
    assert not [*(tmp_path / "out").glob("quant*_config.json")]


@pytest.mark.parametrize("name", ["scale", "qscale_weight"])
def test_fp8_whose_scales_have_another_name(name: str, golden: Path, tmp_path: Path) -> None:
    original = golden / "native_llama_blockfp8"
    tensors = {key.replace("weight_scale_inv", name): t for key, t in raw_checkpoint.read(original).items()}
    folder = raw_checkpoint.write(tmp_path / name, original, [tensors])
    want, got = load_quantized(original), load_quantized(folder)
    assert got.load_report.unexpected == []
    assert {layer.format for layer in got.load_report.layers} == {"fp8_block"}
    state = want.state_dict()
    assert all(torch.equal(state[key].view(torch.uint8), t.view(torch.uint8)) for key, t in got.state_dict().items())


@pytest.mark.parametrize("lacking", ["all", "one"])
def test_static_activations_without_their_scales(
    lacking: str, golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, one = golden / "quark_llama_fp8", "model.layers.1.mlp.down_proj.input_scale"
    tensors = raw_checkpoint.read(original)
    for name in [name for name in tensors if (name.endswith("input_scale") and lacking == "all") or name == one]:
        del tensors[name]
    folder = raw_checkpoint.write(tmp_path / "lacking", original, [tensors])
    layer = r"model\.layers\.\d\.\w+\.\w+" if lacking == "all" else r"model\.layers\.1\.mlp\.down_proj"
    for activations in ("auto", "emulate"):
        with pytest.raises(CheckpointError, match=rf"{layer}: .* no {layer}\.input_scale; .*--activations none"):
            load_quantized(folder, options=LoadOptions(activations=activations))
    weights_alone = LoadOptions(activations="none")
    with caplog.at_level(logging.WARNING, "quantload"):
        got = load_quantized(folder, options=weights_alone)
    count = len(got.load_report.layers) if lacking == "all" else 1
    (said,) = [text for record in caplog.records if "input_scale" in (text := record.getMessage())]
    assert re.match(rf"{count} layers have no input_scale, such as {layer}, ", said)
    tokens = torch.arange(8)[None]
    want = load_quantized(original, options=weights_alone)
    assert torch.equal(got(tokens).logits, want(tokens).logits)
    anew, usual = load_quantized(folder, "quark_mxfp4"), load_quantized(original, "quark_mxfp4")  # which uses no scale
    assert torch.equal(anew(tokens).logits, usual(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nvfp4_is_kept_as_it_is_stored(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Three tensors of each weight, which stand for what was stored."""
    quantized, plain = quantized_copy(tmp_path, checkpoint(name), *METHODS["nvfp4"])
    got, want = load_quantized(quantized), load_quantized(plain, "none")
    assert {layer.scheme for layer in got.load_report.layers} == {"prequantized"}
    weights = dict(want.named_parameters())
    scaled = [key.removesuffix("_scale_2") for key in got.state_dict() if key.endswith("_scale_2")]
    assert scaled
    for key in scaled:
        codes, scale, scale_2 = (got.state_dict()[key + suffix] for suffix in NVFP4.suffixes)
        of_each = scale_2.numel()  # experts have one for gate and one for up
        matrices = (each.reshape(of_each, -1, each.shape[-1]) for each in (codes, scale, scale_2, weights[key]))
        for *tensors, expected in zip(*matrices, strict=True):
            values = torch.empty(expected.shape)
            kernel_set("nvfp4", "cpu").dequantize(tuple(tensors), values)
            torch.testing.assert_close(values.to(expected.dtype), expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(SPLIT))
def test_blocks_across_the_border_of_two_matrices_can_only_be_quantized_anew(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantized, plain = quantized_copy(tmp_path, checkpoint(name), *METHODS["fp8 blocks"])
    with pytest.raises(CheckpointError, match=r"blocks of 128 rows lie across the border .* choose a quantization"):
        load_quantized(quantized)
    got, want = load_quantized(quantized, "quark_mxfp4"), load_quantized(plain, "quark_mxfp4")
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", sorted(TRANSPOSED))
def test_codes_of_a_transposed_matrix_are_refused(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantized, _ = quantized_copy(tmp_path, checkpoint(name), *METHODS["fp8 rows"])
    with pytest.raises(UnsupportedCheckpointError, match="with its rows and columns exchanged"):
        load_quantized(quantized)
