"""Activations: the pairs there are, what the rounding does to numbers, and that matmuls see it."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import quantload
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload import LoadOptions, load_quantized
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError, PolicyError
from quantload.kernels import registry
from quantload.kernels.formats import FORMATS
from quantload.kernels.reference.choose import reference
from quantload.schemes import activations as act
from quantload.schemes.activations import Activation, ActivationFormat, InputScales, choose_activations
from quantload.schemes.registry import SchemeFactory
from quantload.schemes.stored.weights import StoredActivations
from torch import Tensor, nn

CPU = torch.device("cpu")
DEMO_MODEL = Path(quantload.__file__).parent / "demo_model"


FORMAT_OF = {
    "quark_mxfp4": "mxfp4",
    **{name: name for name in ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8")},
    "fp8_per_channel": "fp8_channel",
    "fp8_per_tensor": "fp8_tensor",
    "int8_per_channel": "int8_channel",
    "quark_int4fp8_moe": "fp8_tensor",
}
"""What rounds as the activations of each scheme: a row of a weight is a token."""


def rounded(x: Tensor, scheme: str) -> Tensor:
    fmt = FORMATS[FORMAT_OF[scheme]]
    codes = torch.empty(fmt.code_shape(*x.shape), dtype=fmt.code_dtype)
    scales = torch.empty(fmt.scale_shape(*x.shape), dtype=fmt.scale_dtype)
    out = torch.empty_like(x)
    reference(FORMAT_OF[scheme]).quantize(x, (codes, scales))
    reference(FORMAT_OF[scheme]).dequantize((codes, scales), out)
    return out


@pytest.mark.parametrize("scheme", FORMAT_OF)
def test_linear_sees_rounded_activations(scheme: str) -> None:
    plain = load_quantized(DEMO_MODEL, scheme)
    emulating = load_quantized(DEMO_MODEL, scheme, options=LoadOptions(activations="emulate"))
    name = "model.layers.0.self_attn.q_proj"
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = plain.get_submodule(name)(rounded(x, scheme))
    assert torch.equal(emulating.get_submodule(name)(x), expected)
    assert not torch.equal(plain.get_submodule(name)(x), expected)
    assert "activations emulated" in emulating.load_report.layers[0].kernel


def test_what_has_no_code_stays_visible() -> None:
    emulating = load_quantized(DEMO_MODEL, "quark_mxfp4", options=LoadOptions(activations="emulate"))
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[1, 3] = float("nan")
    out = emulating.get_submodule("model.layers.0.self_attn.q_proj")(x)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


ALL = (
    act.MXFP4, act.MXFP6_E3M2, act.MXFP6_E2M3, act.MXFP8, act.FP8_STATIC, act.FP8_TENSOR, act.FP8_TOKEN, act.FP8_GROUP,
    act.INT8_STATIC, act.INT8_TOKEN,
)  # fmt: skip
TABLE = {
    "mxfp4": "mxfp4 mxfp6_e3m2 mxfp6_e2m3 fp8-static",
    "mxfp6_e3m2": "mxfp6_e3m2 fp8-static",
    "mxfp6_e2m3": "mxfp6_e2m3 fp8-static",
    "mxfp8": "mxfp8",
    "fp8_channel": "fp8-per-token fp8-per-tensor fp8-static",
    "fp8_tensor": "fp8-per-tensor fp8-per-token fp8-static",
    "fp8_block": "fp8-per-1x128-group",
    "fp8_block_fnuz": "fp8-per-1x128-group",
    "int8_channel": "int8-per-token int8-static",
    "int8_group0_bf16": "int8-per-token int8-static",
    "int4_group128_f16": "",
    "int4fp8_channel": "fp8-per-token fp8-per-tensor fp8-static",
    "nvfp4": "",
}


def stored(activations: ActivationFormat, has_scale: bool = True) -> StoredActivations:
    scale = TensorEntry("fc.input_scale", torch.float32, (1,), 0, 0, 4) if has_scale else None
    return StoredActivations(
        activations.format, not activations.static, activations.granularity, activations.group, scale
    )


def choose(weights: str, option: str, config: StoredActivations | None = None) -> Activation | None:
    choice = choose_activations(FORMATS[weights], config, option, CPU, name="fc")
    assert choice.kernels == {}  # kernels on a CPU leave activations alone
    return choice.emulated


@pytest.mark.parametrize("weights", TABLE)
def test_the_pairs(weights: str) -> None:
    assert " ".join(str(each).replace(" ", "-") for each in act.pairs(FORMATS[weights])) == TABLE[weights]


@pytest.mark.parametrize("activations", ALL, ids=str)
@pytest.mark.parametrize("weights", TABLE)
def test_what_a_config_says_is_taken_or_refused(weights: str, activations: ActivationFormat) -> None:
    config = stored(activations)
    assert choose(weights, "none", config) is None
    if activations in act.pairs(FORMATS[weights]):
        assert choose(weights, "auto", config) is None
        for option in ("emulate", activations.format):
            assert choose(weights, option, config) == Activation(activations, CPU)
        return
    for option in ("auto", "emulate", "mxfp4"):
        with pytest.raises(PolicyError) as caught:
            choose(weights, option, config)
        listed = ", ".join([*(str(each) for each in act.pairs(FORMATS[weights])), "none"])
        assert str(caught.value) == (
            f"fc: {weights} weights do not go with {activations} activations, only with {listed}"
        )


@pytest.mark.parametrize("option", ["mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "fp8", "int8"])
@pytest.mark.parametrize("weights", TABLE)
def test_a_format_that_is_named(weights: str, option: str) -> None:
    found = [each for each in act.pairs(FORMATS[weights]) if each.format == option]
    dynamic = [each for each in found if not each.static]
    if dynamic:
        assert choose(weights, option) == Activation(dynamic[0], CPU)
        return
    message = "have static scales, which only a checkpoint" if found else f"do not go with {option} activations, only"
    with pytest.raises(PolicyError, match=message):
        choose(weights, option)


@pytest.mark.parametrize(
    ("weights", "own"),
    [("mxfp4", act.MXFP4), ("mxfp8", act.MXFP8), ("fp8_block", act.FP8_GROUP), ("int8_channel", act.INT8_TOKEN)],
)
def test_emulating_takes_the_format_of_the_weights(weights: str, own: ActivationFormat) -> None:
    assert choose(weights, "emulate") == Activation(own, CPU)
    assert choose(weights, "auto") is None
    assert choose(weights, "none") is None


def test_there_is_nothing_to_emulate_for_int4() -> None:
    message = "fc: int4_group128_f16 weights do not go with emulated activations, only with none"
    with pytest.raises(PolicyError, match=message):
        choose("int4_group128_f16", "emulate")


def test_another_format_than_that_of_the_config() -> None:
    assert choose("mxfp4", "mxfp4", stored(act.FP8_STATIC)) == Activation(act.MXFP4, CPU)
    with pytest.raises(PolicyError, match=r"fc: fp8 activations of mxfp4 weights have static scales, .* none$"):
        choose("mxfp4", "fp8", stored(act.MXFP4))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (StoredActivations("fp8", True, "tensor"), "fp8 per tensor"),
        (StoredActivations("mxfp4", False, "group", 32), "mxfp4 static per 1x32 group"),
        (StoredActivations("mxfp4", True, "group", 16), "mxfp4 per 1x16 group"),
    ],
)
def test_dynamic_where_static_is_wanted_and_the_reverse(config: StoredActivations, said: str) -> None:
    with pytest.raises(PolicyError, match=f"do not go with {said} activations, only with mxfp4, .*, fp8 static, none"):
        choose("mxfp4", "auto", config)


@pytest.mark.parametrize("option", ["auto", "emulate", "fp8"])
def test_a_static_scale_that_is_not_there(option: str) -> None:
    with pytest.raises(CheckpointError, match=r"activations are fp8 static, and the checkpoint has no fc\.input_scale"):
        choose("mxfp4", option, stored(act.FP8_STATIC, has_scale=False))
    assert choose("mxfp4", "none", stored(act.FP8_STATIC, has_scale=False)) is None


def test_kernels_that_round_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: registry.candidates("linear", name, "cuda") for name in ("mxfp4", "int8_channel")}
    monkeypatch.setattr(registry, "candidates", lambda _, name, __: [(kernel, None) for kernel, _ in found[name]])
    monkeypatch.setattr(act, "kernels_of", lambda *_: None)
    gpu = torch.device("cuda")

    def choice(name: str, option: str, config: StoredActivations | None = None, online: bool = True) -> tuple[Any, Any]:
        made = choose_activations(FORMATS[name], config, option, gpu, name="fc", online=online)
        return made.emulated and made.emulated.format, made.kernels

    plain = {"linear": "triton"}
    assert choice("mxfp4", "auto") == (None, {})
    assert choice("mxfp4", "auto", None, online=False) == (None, plain)  # a config that quantizes weights only
    assert choice("mxfp4", "auto", stored(act.MXFP4), online=False) == (None, {})
    assert choice("mxfp4", "auto", stored(act.MXFP6_E2M3), online=False) == (None, plain)
    assert choice("mxfp4", "none") == (None, plain)
    assert choice("mxfp4", "mxfp4") == (None, {"linear": "aiter"})
    assert choice("mxfp4", "emulate") == (act.MXFP4, plain)
    assert choice("mxfp4", "mxfp6_e2m3") == (act.MXFP6_E2M3, plain)
    assert choice("mxfp4", "fp8", stored(act.FP8_STATIC), online=False) == (act.FP8_STATIC, plain)
    assert choice("int8_channel", "auto") == (None, {})  # weight-only is the best there
    assert choice("int8_channel", "int8") == (None, {"linear": "triton_w8a8"})


def rounds(activations: ActivationFormat, x: list[list[float]], scale: float | None = None) -> list[list[float]]:
    given_scale = None if scale is None else torch.tensor([scale])
    rounded: list[list[float]] = Activation(activations, CPU)(torch.tensor(x), given_scale).tolist()
    return rounded


def test_mx_rounding() -> None:
    """The scale is 1: amax has the exponent of the largest code, 2 in E2M1 and E2M3, 4 in E3M2, 8 in E4M3."""
    small = [0.3, -0.26, 1.3, 2.6]
    assert rounds(act.MXFP4, [[*small, 4.0]]) == [[0.5, -0.5, 1.5, 3.0, 4.0]]
    assert rounds(act.MXFP6_E2M3, [[*small, 4.0]]) == [[0.25, -0.25, 1.25, 2.5, 4.0]]
    assert rounds(act.MXFP6_E3M2, [[*small, 16.0]]) == [[0.3125, -0.25, 1.25, 2.5, 16.0]]
    assert rounds(act.MXFP8, [[*small, 256.0]]) == [[0.3125, -0.25, 1.25, 2.5, 256.0]]


def test_fp8_rounding() -> None:
    """With 448 in reach the scale is 1, and codes have three bits of mantissa."""
    assert rounds(act.FP8_TOKEN, [[448.0, 17.0, 0.3], [896.0, 17.0, 0.3]]) == [
        [448.0, 16.0, 0.3125],
        [896.0, 16.0, 0.3125],
    ]
    assert rounds(act.FP8_TOKEN, [[448.0, 33.5], [224.0, 1.0625]])[1] == [224.0, 1.0]
    assert rounds(act.FP8_TENSOR, [[448.0, 17.0], [0.3, 19.0]]) == [[448.0, 16.0], [0.3125, 20.0]]
    wide = [448.0] + [17.0] * 127 + [448 * 1024.0, 17.0]
    assert rounds(act.FP8_GROUP, [wide, [0.0] * 130]) == [[448.0] + [16.0] * 127 + [448 * 1024.0, 16.0], [0.0] * 130]
    assert rounds(act.FP8_TOKEN, [wide])[0][1] == 16.0  # 17 / 1024 is a subnormal, a multiple of 2^-9


def test_static_rounding() -> None:
    assert rounds(act.FP8_STATIC, [[1000.0, -5000.0, 34.0, 0.001]], 2.0) == [[896.0, -896.0, 32.0, 0.0]]
    assert rounds(act.INT8_STATIC, [[1000.0, -5000.0, 1.25, 0.2]], 0.5) == [[63.5, -64.0, 1.0, 0.0]]


def test_int8_rounding() -> None:
    assert rounds(act.INT8_TOKEN, [[127.0, 2.5, -3.5], [-254.0, 2.5, 3.5]]) == [[127.0, 2.0, -4.0], [-254.0, 2.0, 4.0]]


@pytest.mark.parametrize("activations", ALL, ids=str)
@settings(deadline=None, max_examples=25)  # kernels are compiled on their first call
@given(tokens=st.integers(0, 3), k=st.integers(0, 300), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_every_shape(activations: ActivationFormat, tokens: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    before, scale = x.clone(), torch.tensor([0.04]) if activations.static else None
    rounded = Activation(activations, CPU)(x, scale)
    assert (rounded.shape, rounded.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before)
    limit = {"mxfp4": 0.34, "fp8": 0.07, "int8": 0.02}.get(activations.format, 0.14)
    largest, error = (float(values.abs().max()) if x.numel() else 0.0 for values in (x, rounded - x))
    assert error <= limit * largest + (0.02 if activations.static else 0.0)


@pytest.mark.parametrize("activations", ALL, ids=str)
def test_nan_and_infinity_pass_and_leave_the_rest_alone(activations: ActivationFormat) -> None:
    rounding, scale = Activation(activations, CPU), torch.tensor([0.25]) if activations.static else None
    x = torch.linspace(-4, 4, 128).view(2, 64)
    x[0, 3], x[1, 5] = 0.0, 0.0
    broken = x.clone()
    broken[0, 3], broken[1, 5] = float("nan"), float("-inf")
    want = rounding(x, scale)
    want[0, 3], want[1, 5] = broken[0, 3], broken[1, 5]
    assert torch.equal(rounding(broken, scale).nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("activations", [act.MXFP4, act.FP8_STATIC, act.FP8_GROUP], ids=str)
def test_gradients_pass_as_if_nothing_was_rounded(activations: ActivationFormat) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    weights = torch.randn(3, 64)
    (Activation(activations, CPU)(x, torch.tensor([0.1]) if activations.static else None) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


def test_a_copy_rounds_alike() -> None:
    for activations in ALL:
        rounding = Activation(activations, CPU)
        assert copy.deepcopy(rounding) == pickle.loads(pickle.dumps(rounding)) == rounding
        assert astuple(activations)


class Layer(nn.Module):
    """A place for parameters."""


def static_linear(scale: float) -> tuple[Any, Any]:
    """A `quark_mxfp4` linear layer with FP8 static activations and the weight of an identity matrix."""
    scheme: Any = SchemeFactory(CPU, LoadOptions()).linear("quark_mxfp4")
    scheme = type(scheme)(scheme.name, scheme.quantizer, Activation(act.FP8_STATIC, CPU))
    layer = Layer()
    scheme.create_weights(layer, shards=(("", 32),), in_features=32)
    assert (layer.input_scale.shape, layer.input_scale.dtype) == ((1,), torch.float32)
    assert layer.input_scale.is_meta
    assert not layer.input_scale.requires_grad
    codes, scales = torch.empty(32, 16, dtype=torch.uint8), torch.empty(32, 1, dtype=torch.uint8)
    scheme.quantizer.quantize(torch.eye(32), (codes, scales))
    for name, tensor in (("weight", codes), ("weight_scale", scales), ("input_scale", torch.tensor([scale]))):
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return scheme, layer


def test_a_linear_layer_with_a_static_scale() -> None:
    scheme, layer = static_linear(0.5)
    x = torch.linspace(-300, 300, 64).view(2, 32)
    assert torch.equal(scheme.apply(layer, x), (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5)
    assert float(scheme.apply(layer, x).abs().max()) == 224.0
    assert scheme.kernel_names == "numba, fp8 static activations emulated"


def test_dynamic_activations_need_no_scale() -> None:
    scheme: Any = SchemeFactory(CPU, LoadOptions(activations="mxfp6_e2m3")).linear("quark_mxfp4")
    layer = Layer()
    scheme.create_weights(layer, shards=(("", 32),), in_features=32)
    assert [*layer._parameters] == ["weight", "weight_scale"]
    assert scheme.kernel_names == "numba, mxfp6_e2m3 activations emulated"


def test_casting_a_layer_leaves_its_static_scale() -> None:
    scheme, layer = static_linear(0.3)
    assert scheme.kept_exactly(layer) == {"weight", "weight_scale", "input_scale"}


def test_experts_have_a_static_scale_for_each_matmul() -> None:
    scheme: Any = SchemeFactory(CPU, LoadOptions()).experts("quark_mxfp4")
    scheme = type(scheme)(scheme.name, scheme.quantizer, Activation(act.FP8_STATIC, CPU))
    layer: Any = Layer()
    sizes = {"gate_up_proj": ((("w1", 32), ("w3", 32)), 64), "down_proj": ((("w2", 64),), 32)}
    scheme.create_weights(layer, num_experts=3, **sizes)
    names = {"gate_up_proj_input_scale", "down_proj_input_scale"}
    assert {name for name in layer._parameters if name.endswith("input_scale")} == names
    assert names < scheme.kept_exactly(layer)
    assert all(layer._parameters[name].shape == (1,) for name in names)


def test_scales_of_experts_become_their_largest_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    scales = InputScales()
    with caplog.at_level(logging.WARNING, logger="quantload"):
        assert scales.collapse(torch.tensor([0.5, 0.5]), "mlp.experts.gate_up_proj_input_scale").tolist() == [0.5]
        assert caplog.messages == []
        got = scales.collapse(torch.tensor([[0.5], [0.75]], dtype=torch.bfloat16), "mlp.experts.down_proj_input_scale")
        assert (got.tolist(), got.dtype) == ([0.75], torch.float32)
        assert scales.collapse(torch.tensor([2.0, 1.0]), "others").tolist() == [2.0]
        assert scales.collapse(torch.tensor(3.0), "linear").tolist() == [3.0]
    (message,) = caplog.messages
    assert "(mlp.experts.down_proj_input_scale: 0.5 to 0.75); the largest is used" in message


@pytest.mark.parametrize("values", [[0.5, float("nan")], [float("inf")], [0.0], [0.5, -1.0], []])
def test_scales_that_are_none(values: list[float]) -> None:
    with pytest.raises(CheckpointError, match=r"fc\.input_scale is .* are finite numbers above zero"):
        InputScales().collapse(torch.tensor(values), "fc.input_scale")


def test_every_format_of_weights_has_its_pairs() -> None:
    for weights in FORMATS.values():
        for activations in act.pairs(weights):
            assert activations in ALL


def test_pairs_are_checked_before_anything_is_read() -> None:
    with pytest.raises(PolicyError, match="int8_per_channel: int8_channel weights do not go with mxfp4 activations"):
        load_quantized(DEMO_MODEL, "int8_per_channel", options=LoadOptions(activations="mxfp4"))
