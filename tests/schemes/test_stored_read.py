"""The entry point, and the checkpoints with a form of their own: gpt-oss, ModelOpt, quantload's."""

from __future__ import annotations

import time
from typing import Any

import pytest
import stored_tensors
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError, UnsupportedCheckpointError
from quantload.schemes.stored.read import read_stored
from torch import Tensor

FP4_PAIRS = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def no_read(entry: TensorEntry) -> Tensor:
    raise AssertionError(f"{entry.name} was read")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_without_a_quantization_config_all_tensors_are_plain(config: dict[str, None]) -> None:
    entries = stored_tensors.entries({"q.weight": torch.ones(2, 2)})
    stored = read_stored(config, entries, no_read)
    assert (stored.method, stored.weights, stored.plain) == ("none", {}, entries)


@pytest.mark.parametrize("method", ["hqq", None, "bitsandbytes", 3, ["awq"]])
def test_an_unknown_method_is_unsupported(method: int | list[str] | str | None) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"'awq', 'compressed-tensors', 'fp8'.*'mxfp4'.*'quark'"):
        read_stored({"quantization_config": {"quant_method": method}}, {}, no_read)


def test_a_config_that_is_no_object_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="quantization_config is 'awq'; expected an object"):
        read_stored({"quantization_config": "awq"}, {}, no_read)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": "auto"}, torch.bfloat16),
    ],
)
def test_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = {"q.weight": torch.ones(1, 1).to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(1)}
    stored = stored_tensors.read({"quant_method": "fp8"}, tensors, **config)
    assert stored.weights["q.weight"].dtype is dtype


def experts(name: str = "m.mlp.experts.gate_up_proj") -> dict[str, Tensor]:
    blocks = torch.cat([FP4_PAIRS, FP4_PAIRS.flip(0)]).repeat(2, 6, 3, 1)
    scales = torch.arange(120, 120 + 2 * 6 * 3, dtype=torch.uint8).reshape(2, 6, 3)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def test_gpt_oss_experts_are_transposed() -> None:
    tensors = {**experts(), "m.mlp.experts.gate_up_proj_bias": torch.zeros(2, 6, dtype=torch.bfloat16)}
    stored = stored_tensors.read({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tensors)
    weight = stored.weights["m.mlp.experts.gate_up_proj"]
    assert (weight.experts, weight.rows, weight.columns, weight.shape) == (2, 6, 96, (2, 96, 6))
    assert set(stored.plain) == {"m.mlp.experts.gate_up_proj_bias"}
    values = stored_tensors.dequantized(weight, tensors)
    signed = torch.cat([FP4_VALUES, -FP4_VALUES])
    first = signed * 2.0 ** (120 + 6 * 3 + 2 * 3 + 1 - 127)  # expert 1, row 2, block 1
    assert torch.equal(values[1, 32:48, 2], first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m.mlp.experts.gate_up_proj_scales": None}, r"gate_up_proj_scales is missing"),
        ({"m.mlp.experts.gate_up_proj_blocks": None}, r"gate_up_proj_blocks is missing"),
        (
            {"m.mlp.experts.gate_up_proj_scales": torch.zeros(2, 6, 2).byte()},
            r"gate_up_proj_blocks is .*\[2, 6, 3, 16\]",
        ),
        ({"m.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 6, 3, 8).byte()}, r"\[2, 6, 3, 8\]"),
        ({"m.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 6, 3, 16)}, r"torch\.float32 \[2, 6, 3, 16\]"),
        ({"m.mlp.experts.gate_up_proj_scales": torch.zeros(2, 6, 3)}, r"gate_up_proj_scales is torch\.float32"),
    ],
)
def test_gpt_oss_blocks_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    tensors = {name: tensor for name, tensor in {**experts(), **changes}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read({"quant_method": "mxfp4"}, tensors)


def modelopt(algorithm: str | None, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **fields}


def nvfp4(name: str) -> dict[str, Tensor]:
    return {
        f"{name}.weight": FP4_PAIRS.repeat(3, 2),
        f"{name}.weight_scale": torch.tensor([[1.0, 2.0]] * 3).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(0.375),
        f"{name}.input_scale": torch.tensor(0.1),
    }


def test_modelopt_nvfp4() -> None:
    tensors = nvfp4("q")
    stored = stored_tensors.read(modelopt("NVFP4", ignore=["lm_head"], group_size=16), tensors)
    weight = stored.weights["q.weight"]
    assert (weight.format.name, weight.activations, set(stored.unused)) == ("nvfp4", None, {"q.input_scale"})
    row = torch.cat([FP4_VALUES, -FP4_VALUES])
    want = torch.cat([row * 0.375, row * 0.75]).expand(3, 32)
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)


@pytest.mark.parametrize(
    ("algorithm", "scale", "fmt"),
    [
        ("FP8", torch.tensor(1.0), "fp8_tensor"),
        ("fp8_pb_wo", torch.ones(2, 1, 1, 1), "fp8_block"),
        ("FP8_PB_WO", torch.ones(2, 1), "fp8_block"),
        ("FP8_PER_CHANNEL_PER_TOKEN", torch.ones(160), "fp8_channel"),
        ("MXFP8", torch.full((160, 3), 127).byte(), "mxfp8"),
    ],
)
def test_modelopt_fp8(algorithm: str, scale: Tensor, fmt: str) -> None:
    codes = torch.linspace(-4, 4, 160 * 96).reshape(160, 96).to(torch.float8_e4m3fn)
    tensors = {"q.weight": codes, "q.weight_scale": scale, "q.input_scale": torch.tensor(1.0)}
    weight = stored_tensors.read(modelopt(algorithm), tensors).weights["q.weight"]
    assert weight.format.name == fmt
    assert torch.equal(stored_tensors.dequantized(weight, tensors), codes.float())


def test_modelopt_mixed_layers_by_name() -> None:
    layers = {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}}
    codes = torch.ones(2, 2).to(torch.float8_e4m3fn)
    b = {"b.weight": codes, "b.weight_scale": torch.tensor(1.0), "b.input_scale": torch.tensor(1.0)}
    config = modelopt("MIXED_PRECISION", quantized_layers=layers)
    weights = stored_tensors.read(config, {**nvfp4("a"), **b}).weights
    assert {name: weight.format.name for name, weight in weights.items()} == {
        "a.weight": "nvfp4",
        "b.weight": "fp8_tensor",
    }
    with pytest.raises(CheckpointError, match=r"c is stored quantized.*quantized_layers does not name it"):
        stored_tensors.read(config, nvfp4("c"))


def test_modelopt_ignores_trees() -> None:
    config = modelopt("NVFP4", ignore=["m.mlp.gate*", "m.attn*"])
    assert set(stored_tensors.read(config, nvfp4("m.mlp.gate_proj")).weights) == {"m.mlp.gate_proj.weight"}
    for module in ("m.attn", "m.attn.q"):
        with pytest.raises(CheckpointError, match=rf"{module} is stored quantized.*ignore has 'm\.attn\*'"):
            stored_tensors.read(config, nvfp4(module))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (modelopt("INT4_AWQ"), nvfp4("q"), r"quant_algo is 'INT4_AWQ'; supported: 'FP8'"),
        (modelopt(None), nvfp4("q"), r"quant_algo is None"),
        (modelopt("NVFP4", group_size=32), nvfp4("q"), r"group_size is 32; supported: 16"),
        (
            modelopt("NVFP4"),
            {**nvfp4("q"), "q.weight_scale_2": torch.ones(2)},
            r"q\.weight_scale_2 has the shape \[2\]",
        ),
        (modelopt("NVFP4"), {**nvfp4("q"), "q.pre_quant_scale": torch.ones(32)}, r"q\.pre_quant_scale .*nothing that"),
        (modelopt("FP8"), {"q.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, r"q\.weight_scale is missing"),
    ],
)
def test_modelopt_errors(config: dict[str, Any], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config, tensors)


OWN: dict[str, Any] = {
    "quant_method": "quantload",
    "format_version": 1,
    "formats": {"a.weight": "mxfp4", "m.experts.down_proj": "fp8_channel", "b.weight": "int4_group32_f16"},
    "shapes": {"a.weight": [None, 3, 40], "m.experts.down_proj": [2, 3, 5], "b.weight": [None, 2, 64]},
    "transposed": ["m.experts.down_proj"],
}


def own() -> dict[str, Tensor]:
    return {
        "a.weight": FP4_PAIRS.repeat(3, 4),
        "a.weight_scale": torch.full((3, 2), 128, dtype=torch.uint8),
        "m.experts.down_proj": torch.arange(30.0).reshape(2, 3, 5).to(torch.float8_e4m3fn),
        "m.experts.down_proj_scale": torch.arange(1.0, 7.0).reshape(2, 3, 1),
        "b.weight": torch.full((2, 32), 0x21, dtype=torch.uint8),
        "b.weight_scale": torch.tensor([[2.0, 1.0, 4.0, 3.0]] * 2).half(),
        "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    }


def test_a_star_stands_for_all_experts_that_have_a_tensor_of_such_a_name() -> None:
    name = "m.experts.{}.up_proj.weight"
    fields = {**OWN, "formats": {name.format("*"): "mxfp4"}, "shapes": {name.format("*"): [None, 3, 40]}}
    tensors = {}
    for expert in (0, 7, 12):
        tensors[name.format(expert)] = FP4_PAIRS.repeat(3, 4)
        tensors[f"{name.format(expert)}_scale"] = torch.full((3, 2), 127, dtype=torch.uint8)
    stored = stored_tensors.read(fields, tensors | {"m.up_proj.weight": torch.ones(3, 3)})
    assert set(stored.weights) == {name.format(expert) for expert in (0, 7, 12)}
    assert set(stored.plain) == {"m.up_proj.weight"}
    tensors[f"{name.format(7)}_scale"] = torch.full((3, 1), 127, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"m\.experts\.7\.up_proj\.weight_scale is torch\.uint8 \[3, 1\]"):
        stored_tensors.read(fields, tensors)
    with pytest.raises(CheckpointError, match=r"m\.experts\.\*\.up_proj\.weight is missing"):
        stored_tensors.read(fields, {})


def test_quantload_reads_its_own_form() -> None:
    tensors = own()
    stored = stored_tensors.read(OWN, tensors)
    assert stored.method == "quantload"
    assert set(stored.plain) == {"norm.weight"}
    values = {name: stored_tensors.dequantized(weight, tensors) for name, weight in stored.weights.items()}
    row = torch.cat([FP4_VALUES, -FP4_VALUES]).repeat(4)[:40]
    assert torch.equal(values["a.weight"], 2 * row.expand(3, 40))
    experts = tensors["m.experts.down_proj"].float() * tensors["m.experts.down_proj_scale"]
    assert torch.equal(values["m.experts.down_proj"], experts.transpose(1, 2))
    assert torch.equal(values["b.weight"], torch.tensor([0.0, 2.0] * 16 + [-8.0, -4.0] * 16).expand(2, 64))


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"format_version": 2}, {}, r"format_version is 2; supported: 1"),
        ({"formats": {"a.weight": "mxfp5"}}, {}, r"formats\.a\.weight is 'mxfp5'; supported: 'mxfp4'"),
        ({"shapes": {}}, {}, r"shapes\.a\.weight is None; expected \[experts or null, rows, columns\]"),
        ({"shapes": {**OWN["shapes"], "a.weight": [None, 0, 40]}}, {}, r"shapes\.a\.weight is \[None, 0, 40\]"),
        (
            {"shapes": {**OWN["shapes"], "a.weight": [None, 3, 72]}},
            {},
            r"a\.weight is torch\.uint8 \[3, 32\]; .*\[3, 48\]",
        ),
        ({"transposed": "a"}, {}, r"transposed is 'a'"),
        ({}, {"a.weight_scale": torch.zeros(3, 1).byte()}, r"a\.weight_scale is torch\.uint8 \[3, 1\].*\[3, 2\]"),
        ({}, {"b.weight_scale": torch.zeros(2, 4)}, r"b\.weight_scale is torch\.float32"),
        ({}, {"b.weight": None}, r"b\.weight is missing"),
    ],
)
def test_quantload_errors(fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    tensors = {name: tensor for name, tensor in {**own(), **changes}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read({**OWN, **fields}, tensors)


def test_a_hundred_thousand_tensors_take_seconds() -> None:
    codes, scale = torch.zeros(32, 16, dtype=torch.uint8), torch.zeros(32, 1, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for layer in range(60):
        for expert in range(278):
            for name in ("gate_proj", "up_proj", "down_proj"):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    exclude = ["lm_head", "re:.*self_attn.*", *(f"*.layers.{layer}.mlp.gate" for layer in range(60))]
    config = {"quant_method": "quark", "global_quant_config": {"weight": spec}, "exclude": exclude}
    entries = stored_tensors.entries(tensors)
    started = time.perf_counter()
    stored = read_stored({"quantization_config": config}, entries, no_read)
    assert len(stored.weights) == len(tensors) // 2 == 50040
    assert time.perf_counter() - started < 30
