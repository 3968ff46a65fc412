"""Checkpoints that are quantized already: read as they are stored, or quantized anew, piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import raw_checkpoint
import torch
from quantized_copies import fp8_tensors, quantized_copy
from quantized_models import quantized_modules, state_bytes
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.errors import CheckpointError, NonFiniteWeightError, PolicyError
from quantload.kernels.registry import kernel_set
from stored_values import stored_values
from torch import Tensor, nn

FORMATS = {
    "quark_llama_mxfp4": "mxfp4",
    "quark_qwen3moe_mxfp4": "mxfp4",
    "quark_llama_mxfp6_e2m3": "mxfp6_e2m3",
    "quark_llama_mxfp6_e3m2": "mxfp6_e3m2",
    "quark_llama_fp8": "fp8_tensor",
    "quark_llama_ptpc_fp8": "fp8_channel",
    "quark_llama_int8": "int8_channel",
    "quark_llama_int4_fp8": "int4_group0_f32",
    "ct_llama_mxfp4": "mxfp4",
    "ct_llama_mxfp8a16": "mxfp8",
    "ct_llama_fp8_dynamic": "fp8_channel",
    "ct_llama_fp8_block": "fp8_block",
    "ct_llama_w8a8": "int8_channel",
    "ct_llama_w4a16": "int4_group128_bf16",
    "native_llama_awq": "int4_group128_f16",
    "native_llama_blockfp8": "fp8_block",
    "native_llama_gptq": "int4_group64_f16",
    "native_gptoss_mxfp4": "mxfp4",
}
SMALL = LoadOptions(chunk_bytes=4096, workers=3)


def by_checkpoint_name(model: nn.Module) -> dict[str, Tensor]:
    """What the quantized modules stand for, as the checkpoint has them: one matrix an expert, as its codes lie."""
    found: dict[str, Tensor] = {}
    for name, module in quantized_modules(model).items():
        if not hasattr(module, "gate_up_proj"):
            found[name] = module.dequantize()
            continue
        for weight in ("gate_up_proj", "down_proj"):
            values = module.dequantize(weight)
            if module.is_transposed:
                found[f"{name}.{weight}"] = values.transpose(1, 2)
                continue
            for expert, matrix in enumerate(values):
                parts = matrix.chunk(2) if weight == "gate_up_proj" else (matrix,)
                kinds = ("gate_proj", "up_proj") if weight == "gate_up_proj" else ("down_proj",)
                found.update({f"{name}.{expert}.{kind}": part for kind, part in zip(kinds, parts, strict=True)})
    return found


@pytest.mark.parametrize("options", [LoadOptions(), SMALL], ids=["whole", "small pieces"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_weight_stands_for_what_its_tool_says(name: str, options: LoadOptions, golden: Path) -> None:
    model = load_quantized(golden / name, options=options)
    want, got = stored_values(golden / name), by_checkpoint_name(model)
    assert set(got) == set(want)
    for layer, values in want.items():
        torch.testing.assert_close(got[layer], values, rtol=0, atol=0, msg=partial("{}: {}".format, layer))
    report = model.load_report
    assert report.quantization == "prequantized"
    assert {(layer.scheme, layer.format) for layer in report.layers} == {("prequantized", FORMATS[name])}
    assert report.final_bytes == report.predicted_final_bytes
    assert all(layer.sqnr_db is None for layer in report.layers)
    logits = model(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["quark_qwen3moe_mxfp4", "native_llama_awq", "ct_llama_fp8_block"])
def test_the_order_of_tensors_and_the_shards_they_lie_in_do_not_matter(
    name: str, seed: int, golden: Path, tmp_path: Path
) -> None:
    monkey_written = raw_checkpoint.shuffled(tmp_path / "shuffled", golden / name, seed, shard_count=3)
    want, got = load_quantized(golden / name), load_quantized(monkey_written, options=SMALL)
    for (key, tensor), (other_key, other) in zip(want.state_dict().items(), got.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), key


ANEW = [
    (name, scheme)
    for name in (
        "native_llama_blockfp8", "quark_llama_fp8", "ct_llama_mxfp8a16", "quark_qwen3moe_mxfp4", "native_llama_awq",
    )
    for scheme in ("quark_mxfp4", "mxfp4_rows", "fp8_per_tensor", "fp8_per_block", "int8_per_channel")
]  # fmt: skip
BY_COLUMNS = ("native_llama_awq", "mxfp4_rows")


@pytest.mark.parametrize("options", [LoadOptions(), SMALL], ids=["whole", "small pieces"])
@pytest.mark.parametrize(("name", "scheme"), ANEW)
def test_quantizing_anew_equals_quantizing_what_the_codes_stand_for(
    name: str, scheme: str, options: LoadOptions, golden: Path
) -> None:
    if (name, scheme) == BY_COLUMNS and options is SMALL:
        with pytest.raises(
            PolicyError,
            match=r"_proj.weight is stored column by column.* such as quark_mxfp4, or .* --chunk \d+KiB, chunk_bytes",
        ):
            load_quantized(golden / name, scheme, options=options)
        return
    model = load_quantized(golden / name, scheme, options=options)
    got, want = by_checkpoint_name(model), stored_values(golden / name)
    kept = {layer.name for layer in model.load_report.layers if layer.scheme == "prequantized"}
    fmt = next(iter(quantized_modules(model).values())).scheme.kernels.format
    assert bool(kept) == (FORMATS[name] == fmt.name)
    kernels = kernel_set(fmt.name, "cpu")
    for layer, values in want.items():
        expected = values
        if not kept:
            codes = torch.empty(fmt.code_shape(*values.shape), dtype=fmt.code_dtype)
            scales = torch.empty(fmt.scale_shape(*values.shape), dtype=fmt.scale_dtype)
            kernels.quantize(values.contiguous(), (codes, scales))
            expected = torch.empty_like(values, memory_format=torch.contiguous_format)
            kernels.dequantize((codes, scales), expected)
        assert torch.equal(got[layer], expected), layer
    if not kept:
        assert {layer.scheme for layer in model.load_report.layers} == {scheme}
        assert all(layer.sqnr_db is not None for layer in model.load_report.layers)


def test_a_layer_can_stay_as_stored_while_the_others_are_quantized_anew(golden: Path) -> None:
    policy = QuantizationPolicy(
        linear="quark_mxfp4",
        ignore=("*.q_proj",),
        overrides=(("*.o_proj", "int8_per_channel"), ("*.v_proj", "auto")),
    )
    model = load_quantized(golden / "native_llama_blockfp8", policy=policy)
    schemes = {layer.name.rpartition(".")[2]: (layer.scheme, layer.format) for layer in model.load_report.layers}
    assert schemes["q_proj"] == ("prequantized", "fp8_block")
    assert schemes["v_proj"] == ("prequantized", "fp8_block")
    assert schemes["o_proj"] == ("int8_per_channel", "int8_channel")
    assert schemes["k_proj"] == ("quark_mxfp4", "mxfp4")


def test_rows_of_what_is_stored_column_by_column_come_in_pieces(golden: Path) -> None:
    """Smaller than most weights, and large enough for the eight rows that share a word."""
    pieces = LoadOptions(chunk_bytes=1 << 14, workers=3)
    got, want = (load_quantized(golden / BY_COLUMNS[0], BY_COLUMNS[1], options=o) for o in (pieces, LoadOptions()))
    assert max(len(tensor.flatten()) * 4 for tensor in stored_values(golden / BY_COLUMNS[0]).values()) > 1 << 16
    assert state_bytes(got) == state_bytes(want)


@pytest.mark.parametrize("experts", ["auto", "none"])
def test_experts_can_stay_as_stored_while_linears_are_quantized_anew(experts: str, golden: Path) -> None:
    policy = QuantizationPolicy(linear="fp8_per_channel", experts=experts)
    report = load_quantized(golden / "native_gptoss_mxfp4", policy=policy).load_report
    assert report.quantization == "fp8_per_channel+prequantized"
    assert {layer.scheme for layer in report.layers if layer.name.endswith("experts")} == {"prequantized"}
    assert {layer.scheme for layer in report.layers if layer.name.endswith("proj")} == {"fp8_per_channel"}


def test_one_expert_that_is_not_quantized_is_named(golden: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj"
    tensors = raw_checkpoint.read(golden / "quark_qwen3moe_mxfp4")
    original = raw_checkpoint.read(golden / "bf16_qwen3moe")
    tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    tensors[f"{name}.weight"] = original[f"{name}.weight"]
    folder = raw_checkpoint.write(tmp_path / "mixed", golden / "quark_qwen3moe_mxfp4", [tensors])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_quantized(folder)


def test_a_missing_scale_is_named(golden: Path, tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(golden / "quark_llama_mxfp4")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    folder = raw_checkpoint.write(tmp_path / "no_scale", golden / "quark_llama_mxfp4", [tensors])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        load_quantized(folder)


@pytest.mark.parametrize("options", [LoadOptions(), SMALL], ids=["whole", "small pieces"])
@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
def test_a_packed_shape_in_another_shard_is_compared_with_the_codes(
    scheme: str, options: LoadOptions, golden: Path, tmp_path: Path
) -> None:
    tensors = raw_checkpoint.read(golden / "ct_llama_w4a16")
    shapes = {key: tensors.pop(key) for key in list(tensors) if key.endswith("weight_shape")}
    without = raw_checkpoint.write(tmp_path / "without", golden / "ct_llama_w4a16", [tensors])
    want = load_quantized(golden / "ct_llama_w4a16", scheme, options=options).state_dict()
    got = load_quantized(without, scheme, options=options).state_dict()
    assert all(torch.equal(got[key].view(torch.uint8), want[key].view(torch.uint8)) for key in want)
    key = "model.layers.1.mlp.down_proj.weight_shape"
    shapes[key] = shapes[key].flip(0)
    assert not torch.equal(shapes[key], shapes[key].flip(0))
    folder = raw_checkpoint.write(tmp_path / "wrong", golden / "ct_llama_w4a16", [shapes, tensors])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight_shape says \[\d+, \d+\], but"):
        load_quantized(folder, scheme, options=options)


@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
def test_a_scale_that_is_not_finite_is_named(scheme: str, golden: Path, tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(golden / "native_llama_blockfp8")
    key = "model.layers.1.mlp.down_proj.weight_scale_inv"
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    folder = raw_checkpoint.write(tmp_path / "nan", golden / "native_llama_blockfp8", [tensors])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj.*NaN or infinite"):
        load_quantized(folder, scheme)


@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
@pytest.mark.parametrize(
    ("tool", "scale", "value"),
    [
        ("compressed-tensors", "weight_global_scale", torch.inf),
        ("compressed-tensors", "weight_global_scale", 0.0),
        ("compressed-tensors", "weight_global_scale", -100.0),
        ("modelopt", "weight_scale_2", torch.inf),
        ("modelopt", "weight_scale_2", -1e-4),
    ],
)
def test_a_tensor_scale_that_no_maximum_gives_is_named(
    tool: str, scale: str, value: float, scheme: str, golden: Path, tmp_path: Path
) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "nvfp4", "nvfp4", format=tool)
    tensors = raw_checkpoint.read(tmp_path / "nvfp4")
    key = f"model.layers.1.mlp.down_proj.{scale}"
    tensors[key] = torch.full_like(tensors[key], value)
    folder = raw_checkpoint.write(tmp_path / "damaged", tmp_path / "nvfp4", [tensors])
    with pytest.raises(NonFiniteWeightError, match=r"layers\.1\.mlp\.down_proj.*NaN or infinite"):
        load_quantized(folder, scheme)


@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("native_llama_blockfp8", "bfloat16", torch.finfo(torch.bfloat16).max / 448),
        ("native_llama_blockfp8", "float16", 65504 / 448),
        ("ct_llama_w8a8", "float16", 65504 / 128),
    ],
)
def test_a_finite_scale_that_makes_codes_infinite_is_named(
    name: str, dtype: str, largest: float, scheme: str, golden: Path, tmp_path: Path
) -> None:
    """448 of FP8 or 128 of INT8 times the scale is more than the dtype of the model holds, though float32 does."""
    tensors = raw_checkpoint.read(golden / name)
    config = json.loads((golden / name / "config.json").read_text()) | {"dtype": dtype}
    key = next(key for key in tensors if "layers.1.mlp.down_proj.weight_scale" in key)
    tensors[key] = tensors[key].float()

    def with_scale(scale: float) -> Path:
        tensors[key][0, 0] = scale
        folder = raw_checkpoint.write(tmp_path / str(scale), golden / name, [tensors])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    load_quantized(with_scale(0.99 * largest), scheme)
    with pytest.raises(NonFiniteWeightError, match=r"layers\.1\.mlp\.down_proj\.weight.*: a scale is .* are infinite"):
        load_quantized(with_scale(1.01 * largest), scheme)


@pytest.mark.parametrize("scheme", ["auto", "int8_per_channel"])
@pytest.mark.parametrize("name", ["ct_llama_mxfp8a16", "native_gptoss_mxfp4"])
def test_scales_declared_as_e8m0_are_the_bytes_they_are(name: str, scheme: str, golden: Path, tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(golden / name)
    declared = {key: value.view(torch.float8_e8m0fnu) for key, value in tensors.items() if key.endswith("_scale")}
    declared |= {key: value.view(torch.float8_e8m0fnu) for key, value in tensors.items() if key.endswith("_scales")}
    assert declared
    folder = raw_checkpoint.write(tmp_path / "declared", golden / name, [tensors | declared])
    got, want = load_quantized(folder, scheme).state_dict(), load_quantized(golden / name, scheme).state_dict()
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(got[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_codes_that_become_infinite_are_named_where_they_are_quantized_anew(golden: Path, tmp_path: Path) -> None:
    """448 * 2^127 is no float32; only what is quantized anew looks at the values."""
    tensors = raw_checkpoint.read(golden / "ct_llama_mxfp8a16")
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[f"{key}_scale"][2, 1] = 254
    tensors[key][2, 32] = 448
    folder = raw_checkpoint.write(tmp_path / "large", golden / "ct_llama_mxfp8a16", [tensors])
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_quantized(folder, "int8_per_channel")


@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_not_finite_is_named(code: int, scheme: str, golden: Path, tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(golden / "native_llama_blockfp8")
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[key].view(torch.uint8)[3, 5] = code
    folder = raw_checkpoint.write(tmp_path / "nan", golden / "native_llama_blockfp8", [tensors])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: a code is NaN"):
        load_quantized(folder, scheme)


def test_static_input_scales_are_read_where_activations_are_emulated(golden: Path) -> None:
    folder = golden / "quark_llama_fp8"
    model = load_quantized(folder, options=LoadOptions(activations="emulate"))
    tensors = raw_checkpoint.read(folder)
    for name, module in quantized_modules(model).items():
        assert torch.equal(module.state_dict()["input_scale"], tensors[f"{name}.input_scale"].float().reshape(1))
    report = model.load_report
    assert all(layer.kernel.endswith("fp8 static activations emulated") for layer in report.layers)
    assert report.final_bytes == report.predicted_final_bytes
    tokens = torch.arange(8)[None]
    assert not torch.equal(model(tokens).logits, load_quantized(folder)(tokens).logits)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 0.0, -1.0])
def test_a_static_input_scale_that_is_none_is_named_where_it_is_used(
    scale: float, golden: Path, tmp_path: Path
) -> None:
    tensors = raw_checkpoint.read(golden / "quark_llama_fp8")
    key = "model.layers.1.mlp.down_proj.input_scale"
    tensors[key] = torch.full_like(tensors[key], scale)
    folder = raw_checkpoint.write(tmp_path / "broken", golden / "quark_llama_fp8", [tensors])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(key)} is \[{scale}\]; static scales.*activations='none'"):
        load_quantized(folder, options=LoadOptions(activations="emulate"))
    tokens = torch.arange(8)[None]
    want = load_quantized(golden / "quark_llama_fp8")(tokens).logits
    for activations in ("auto", "none"):  # nothing rounds on a CPU
        assert torch.equal(load_quantized(folder, options=LoadOptions(activations=activations))(tokens).logits, want)
    load_quantized(folder, "quark_mxfp4")


@pytest.mark.parametrize("options", [LoadOptions(), SMALL], ids=["whole", "small pieces"])
def test_the_expert_with_an_input_scale_that_is_none_is_named(
    options: LoadOptions, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    wrong = "model.layers.1.mlp.experts.2.up_proj"

    def static(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, values = fp8_tensors(module, weight)
        return tensors | {f"{module}.input_scale": torch.tensor(0.0 if module == wrong else 0.5)}, values

    config = {"quant_method": "fp8", "activation_scheme": "static"}
    folder, _ = quantized_copy(tmp_path, checkpoint("qwen3_moe"), static, config)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(wrong)}\.input_scale is \[0\.0\]; static scales"):
        load_quantized(folder, options=replace(options, activations="emulate"))
    assert load_quantized(folder, options=options).load_report.quantization == "prequantized"


@pytest.mark.parametrize("options", [LoadOptions(), SMALL], ids=["whole", "small pieces"])
@pytest.mark.parametrize(
    ("name", "scheme", "form"),
    [
        ("native_llama_blockfp8", "quark_mxfp4", "quark"),
        ("quark_llama_fp8", "mxfp6_e2m3", "quark"),
        ("ct_llama_mxfp8a16", "fp8_per_tensor", "compressed-tensors"),
        ("native_llama_awq", "fp8_per_block", "compressed-tensors"),
        ("quark_qwen3moe_mxfp4", "int8_per_channel", "compressed-tensors"),
    ],
)
def test_a_quantized_checkpoint_is_converted_to_another(
    name: str, scheme: str, form: str, options: LoadOptions, golden: Path, tmp_path: Path
) -> None:
    convert_checkpoint(golden / name, tmp_path / "out", scheme, format=form, options=options)
    got, want = load_quantized(tmp_path / "out"), load_quantized(golden / name, scheme)
    assert got.load_report.quantization == "prequantized"
    assert len(got.load_report.layers) == len(want.load_report.layers)
    for key, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("scheme", ["auto", "none", "quark_mxfp4"])
def test_converting_to_what_a_checkpoint_is_already_is_refused(scheme: str, golden: Path, tmp_path: Path) -> None:
    said = r"would stay mxfp4, as the checkpoint stores it.*; and \d+ more; convert writes .* name a scheme .*-q SCHEME"
    with pytest.raises(PolicyError, match=said) as caught:
        convert_checkpoint(golden / "quark_llama_mxfp4", tmp_path / "out", scheme)
    assert "needs no converting: load the checkpoint as it is" in str(caught.value)
    assert "keep them" not in str(caught.value)
    assert not list(tmp_path.iterdir())
