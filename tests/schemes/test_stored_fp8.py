"""FP8 by block, by tensor and by row, with float or E8M0 scales, and what is wrong with a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import stored_tensors
import torch
from quantload.errors import CheckpointError, UnsupportedCheckpointError
from torch import Tensor

BLOCKS = [128, 128]


def config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **fields}


def codes(rows: int = 160, columns: int = 192) -> Tensor:
    return torch.linspace(-4, 4, rows * columns).reshape(rows, columns).to(torch.float8_e4m3fn)


def blocks(scale: Tensor, name: str = "q") -> dict[str, Tensor]:
    return {f"{name}.weight": codes(), f"{name}.weight_scale_inv": scale}


def expanded(scale: Tensor) -> Tensor:
    return scale.float().repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :192]


SCALE = torch.tensor([[1.0, 2.0], [0.5, 4.0]])


@pytest.mark.parametrize(
    "scale",
    [
        SCALE,
        SCALE.bfloat16(),
        SCALE.to(torch.float8_e8m0fnu),
        SCALE.to(torch.float8_e8m0fnu).view(torch.uint8),
    ],
    ids=lambda scale: str(scale.dtype),
)
def test_blocks(scale: Tensor) -> None:
    tensors = blocks(scale)
    weight = stored_tensors.read(config(weight_block_size=BLOCKS), tensors).weights["q.weight"]
    assert weight.format.name == "fp8_block"
    assert torch.equal(stored_tensors.dequantized(weight, tensors), codes().float() * expanded(SCALE))


def test_blocks_of_a_row_are_mxfp8() -> None:
    scales = torch.full((160, 6), 126, dtype=torch.uint8)
    tensors = {"q.weight": codes(), "q.weight_scale_inv": scales}
    for said in (config(weight_block_size=[1, 32], scale_fmt="ue8m0"), {"quant_method": "mxfp8"}):
        weight = stored_tensors.read(said, tensors).weights["q.weight"]
        assert weight.format.name == "mxfp8"
        assert torch.equal(stored_tensors.dequantized(weight, tensors), codes().float() * 0.5)


@pytest.mark.parametrize("name", ["scale", "qscale_weight", "weight_scale"])
def test_blocks_whose_scales_have_another_name(name: str) -> None:
    tensors = {"q.weight": codes(), f"q.{name}": SCALE.to(torch.float8_e8m0fnu), "q.qscale_act": torch.ones(())}
    stored = stored_tensors.read(config(weight_block_size=BLOCKS, scale_fmt="ue8m0"), tensors)
    weight = stored.weights["q.weight"]
    assert weight.format.name == "fp8_block"
    assert set(stored.unused) == {"q.qscale_act"}
    assert torch.equal(stored_tensors.dequantized(weight, tensors), codes().float() * expanded(SCALE))


def test_a_parameter_called_scale_is_none_of_codes() -> None:
    """Norms and hyper-connections have one; so have the fake quantizers of attention, which nothing here needs."""
    tensors = {"norm.scale": torch.ones(4), "hc.scale": torch.ones(3), "hc.weight": torch.ones(3)}
    unused = {"a.q_fake_quantizer.qscale_act": torch.ones(())}
    stored = stored_tensors.read(config(weight_block_size=BLOCKS), {**blocks(SCALE), **tensors, **unused})
    assert (set(stored.plain), set(stored.unused)) == (set(tensors), set(unused))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("name", ["scale", "weight_scale_inv"])
def test_weights_of_four_bits_beside_fp8_are_mxfp4(name: str, dtype: torch.dtype) -> None:
    """Experts of DeepSeek-V4: two codes in a byte, the first in its low bits, and an E8M0 scale for 32."""
    packed = torch.arange(256).to(torch.uint8).repeat(2, 1)  # [2, 512]
    tensors = {"e.weight": packed.view(dtype), f"e.{name}": torch.full((2, 16), 126).byte().view(torch.float8_e8m0fnu)}
    stored = stored_tensors.read(config(weight_block_size=BLOCKS), {**blocks(SCALE), **tensors})
    weight = stored.weights["e.weight"]
    assert (weight.format.name, weight.activations) == ("mxfp4", None)
    assert stored.weights["q.weight"].activations is not None
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]) / 2
    wanted = torch.stack((values[packed.long() & 15], values[packed.long() >> 4]), dim=2).flatten(1)
    tensors["e.weight"] = packed
    assert torch.equal(stored_tensors.dequantized(weight, tensors), wanted)


def test_scales_of_four_bits_that_are_no_powers_of_two_are_refused() -> None:
    tensors = {"e.weight": torch.zeros(2, 16, dtype=torch.int8), "e.scale": torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match=r"e\.scale is float32; a weight in mxfp4 takes uint8 or float8_e8m0fnu"):
        stored_tensors.read(config(weight_block_size=BLOCKS), tensors)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "qscale_weight", "scale"])
@pytest.mark.parametrize(
    ("scale", "fmt"),
    [
        (torch.tensor(0.5), "fp8_tensor"),
        (torch.tensor([0.5], dtype=torch.bfloat16), "fp8_tensor"),
        (torch.arange(1.0, 161.0), "fp8_channel"),
        (torch.arange(1.0, 161.0).bfloat16()[:, None], "fp8_channel"),
    ],
)
def test_one_scale_or_one_for_each_row(name: str, scale: Tensor, fmt: str) -> None:
    tensors = {"q.weight": codes(), f"q.{name}": scale}
    weight = stored_tensors.read(config(), tensors).weights["q.weight"]
    assert weight.format.name == fmt
    assert torch.equal(stored_tensors.dequantized(weight, tensors), codes().float() * scale.float().reshape(-1, 1))


@pytest.mark.parametrize(
    ("fields", "described"),
    [
        ({"weight_block_size": BLOCKS}, ("fp8", True, "group", 128)),
        ({}, ("fp8", True, "token", 0)),
        ({"activation_scheme": "static"}, ("fp8", False, "tensor", 0)),
        ({"activation_scheme": None}, None),
    ],
)
def test_activations(fields: dict[str, Any], described: tuple[str, bool, str, int] | None) -> None:
    scale = SCALE if "weight_block_size" in fields else torch.tensor(1.0)
    tensors = blocks(scale) | {"q.activation_scale": torch.tensor(2.0)}
    found = stored_tensors.read(config(**fields), tensors).weights["q.weight"].activations
    assert (found and (found.format, found.dynamic, found.granularity, found.group)) == described
    if found is not None and not found.dynamic:
        assert found.scale is not None
        assert found.scale.name == "q.activation_scale"


@pytest.mark.parametrize("name", ["input_scale", "activation_scale", "qscale_act"])
def test_a_static_scale_under_any_of_its_names(name: str) -> None:
    tensors = {**blocks(torch.tensor(1.0)), f"q.{name}": torch.tensor(2.0)}
    weight = stored_tensors.read(config(activation_scheme="static"), tensors).weights["q.weight"]
    assert weight.activations is not None
    assert not weight.activations.lacks_scale
    assert weight.input_scale is not None
    assert weight.input_scale.name == f"q.{name}"


def test_a_static_scale_that_is_missing_is_known_and_one_that_is_no_number_is_named() -> None:
    tensors = blocks(torch.tensor(1.0))
    weight = stored_tensors.read(config(activation_scheme="static"), tensors).weights["q.weight"]
    assert weight.activations is not None
    assert weight.activations.lacks_scale
    with pytest.raises(CheckpointError, match=r"q\.input_scale has the shape \[2\]"):
        stored_tensors.read(config(activation_scheme="static"), {**tensors, "q.input_scale": torch.ones(2)})


E, N, K = 3, 256, 192
HALVES = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    ("fields", "scale", "spread", "fmt"),
    [
        (
            {"weight_block_size": BLOCKS},
            torch.arange(1.0, 13.0).reshape(E, 2, 2),
            lambda scale: scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :, :K],
            "fp8_block",
        ),
        ({"weight_block_size": [1, 32]}, torch.full((E, N, 6), 128).byte(), lambda scale: 2.0, "mxfp8"),
        ({}, torch.arange(1.0, E * N + 1).reshape(E, N, 1), lambda scale: scale, "fp8_channel"),
        ({}, torch.arange(1.0, E * N + 1).reshape(E, N), lambda scale: scale[..., None], "fp8_channel"),
        ({}, torch.tensor([1.0, 2.0, 4.0]), lambda scale: scale[:, None, None], "fp8_channel"),
        ({}, torch.tensor([1.0, 2.0, 4.0]).reshape(E, 1, 1), lambda scale: scale, "fp8_channel"),
        ({}, HALVES[..., None], lambda scale: scale.repeat_interleave(N // 2, 1), "fp8_channel"),
        ({}, torch.tensor(0.5), lambda scale: scale, "fp8_tensor"),
    ],
    ids=["blocks", "mx", "rows", "rows [E, N]", "experts", "experts [E, 1, 1]", "halves", "all"],
)
def test_all_experts_in_one_tensor(
    fields: dict[str, list[int]], scale: Tensor, spread: Callable[..., Any], fmt: str, suffix: str
) -> None:
    stored = codes(E * N, K).reshape(E, N, K)
    tensors = {"m.experts.gate_up_proj": stored, f"m.experts.gate_up_proj{suffix}": scale}
    tensors |= {"m.experts.gate_up_proj_activation_scale": torch.tensor([1.0, 2.0, 3.0])}
    tensors["m.experts.bias"] = torch.zeros(E, N, dtype=torch.bfloat16)
    found = stored_tensors.read(config(**fields), tensors)
    weight = found.weights["m.experts.gate_up_proj"]
    assert (weight.format.name, weight.experts, weight.shape) == (fmt, E, (E, N, K))
    assert set(found.plain) == {"m.experts.bias"}
    if fmt != "fp8_tensor":  # whose one scale stands for all matrices, and is handed to each
        assert torch.equal(stored_tensors.dequantized(weight, tensors), stored.float() * spread(scale))


def test_static_scales_of_all_experts() -> None:
    tensors = {
        "m.experts.down_proj": codes(E * N, K).reshape(E, N, K),
        "m.experts.down_proj_scale": torch.ones(E, 1, 1),
        "m.experts.down_proj_activation_scale": torch.tensor([1.0, 2.0, 3.0]),
    }
    found = stored_tensors.read(config(activation_scheme="static"), tensors)
    activations = found.weights["m.experts.down_proj"].activations
    assert activations is not None
    scale = activations.scale
    assert scale is not None
    assert (scale.name, scale.nbytes) == ("m.experts.down_proj_activation_scale", 12)


@pytest.mark.parametrize(
    ("fields", "rows", "scale", "error", "message"),
    [
        ({"weight_block_size": BLOCKS}, 200, torch.ones(E, 2, 2), UnsupportedCheckpointError, "has 200 rows for each"),
        ({"weight_block_size": BLOCKS}, 250, torch.ones(E, 2, 2), UnsupportedCheckpointError, "has 250 rows for each"),
        ({"weight_block_size": BLOCKS}, 256, torch.ones(E, 2, 3), CheckpointError, r"shape \[6, 3\].*needs \[6, 2\]"),
        ({}, 256, torch.ones(E, 4, 1), CheckpointError, r"shape \[12, 1\].*needs \[768\]"),
        ({}, 255, torch.ones(E, 2, 1), CheckpointError, r"shape \[6, 1\].*needs \[765\]"),
    ],
)
def test_scales_that_do_not_fit_all_experts(
    fields: dict[str, list[int]],
    rows: int,
    scale: Tensor,
    error: type[CheckpointError] | type[UnsupportedCheckpointError],
    message: str,
) -> None:
    tensors = {"m.experts.down_proj": codes(E * rows, K).reshape(E, rows, K), "m.experts.down_proj_scale_inv": scale}
    with pytest.raises(error, match=message):
        stored_tensors.read(config(**fields), tensors)


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_are_not_converted(field: str) -> None:
    tensors = {**blocks(SCALE), "lm_head.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    fields = {"weight_block_size": BLOCKS, field: ["lm_head"]}
    assert set(stored_tensors.read(config(**fields), tensors).plain) == {"lm_head.weight"}
    with pytest.raises(CheckpointError, match=rf"q is stored quantized.*{field} has 'q'"):
        stored_tensors.read(config(**{**fields, field: ["q"]}), tensors)


def test_a_wrong_pattern_is_shown_as_it_stands_in_the_config() -> None:
    with pytest.raises(CheckpointError) as caught:
        stored_tensors.read(config(modules_to_not_convert=["lm_head", "mlp.(gate"]), blocks(SCALE))
    assert str(caught.value) == (
        "config.json: quantization_config.modules_to_not_convert has 'mlp.(gate', which is not a regular expression "
        "(missing ), unterminated subpattern); correct the config"
    )


def test_scales_of_attention_are_not_used_and_said_so() -> None:
    tensors = {**blocks(SCALE), "a.k_proj.output_scale": torch.ones(1), "a.attn.v_scale": torch.ones(1)}
    assert set(stored_tensors.read(config(weight_block_size=BLOCKS), tensors).unused) == {
        "a.k_proj.output_scale",
        "a.attn.v_scale",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weight_block_size": [64, 128]},
            r"weight_block_size is \[64, 128\]; supported: None, \[128, 128\], \[1, 32\]",
        ),
        ({"weight_block_size": 128}, r"weight_block_size is 128"),
        ({"fmt": "e5m2"}, r"quantization_config\.fmt is 'e5m2'; supported: 'e4m3'"),
        ({"scale_fmt": "int8"}, r"quantization_config\.scale_fmt is 'int8'"),
        ({"activation_scheme": "sometimes"}, r"activation_scheme is 'sometimes'; supported: 'dynamic', 'static'"),
        ({"modules_to_not_convert": {"a": 1}}, r"modules_to_not_convert is \{'a': 1\}"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), blocks(SCALE))


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"weight_block_size": BLOCKS}, {"q.weight": codes()}, r"q\.weight_scale_inv is missing"),
        ({}, {"q.weight": codes()}, r"q\.weight_scale is missing"),
        (
            {"weight_block_size": BLOCKS},
            blocks(SCALE[:1]),
            r"q\.weight_scale_inv has the shape \[1, 2\].*needs \[2, 2\]",
        ),
        ({"weight_block_size": BLOCKS}, blocks(SCALE.int()), r"q\.weight_scale_inv is int32"),
        ({}, blocks(SCALE), r"q\.weight_scale_inv has the shape \[2, 2\].*needs \[160\] or \[160, 1\]"),
        ({}, {"q.weight_scale": torch.ones(1)}, r"q\.weight is missing"),
        (
            {"weight_block_size": BLOCKS},
            {**blocks(SCALE), "q.weight": codes().float().to(torch.float8_e4m3fnuz)},
            r"q\.weight is float8_e4m3fnuz.*takes float8_e4m3fn",
        ),
        (
            {"weight_block_size": BLOCKS},
            {**blocks(SCALE), "m.experts.up": codes(), "m.experts.up_scale_inv": SCALE},
            r"m\.experts\.up \(torch\.float8_e4m3fn\) belongs to a quantized layer",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    fields: dict[str, list[int]], tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), tensors)
