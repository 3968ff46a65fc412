"""AMD Quark: which spec a layer gets, what is excluded, and what is wrong with a config."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import stored_tensors
import torch
from quantload.errors import CheckpointError
from quantload.schemes.stored.weights import StoredCheckpoint
from torch import Tensor

MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
INT8 = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "symmetric": True}
INT4 = {"dtype": "int4", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}


def layer(
    weight: dict[str, Any] | list[Any] | str | None, inputs: dict[str, Any] | list[Any] | None = None
) -> dict[str, Any]:
    return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}


def config(
    weight: dict[str, Any] | list[Any] | str = MXFP4, inputs: dict[str, Any] | list[Any] | None = None, **fields: Any
) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "global_quant_config": copy.deepcopy(layer(weight, inputs)),
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": [],
        "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": []},
        **fields,
    }


def mxfp4(name: str, rows: int = 4, columns: int = 64) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        f"{name}.weight_scale": torch.full((rows, columns // 32), 127, dtype=torch.uint8),
    }


def int8(name: str, rows: int = 4, columns: int = 32) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.arange(rows * columns, dtype=torch.int8).reshape(rows, columns),
        f"{name}.weight_scale": torch.arange(1, rows + 1, dtype=torch.bfloat16),
        f"{name}.weight_zero_point": torch.zeros(rows, dtype=torch.int8),
    }


def fp8(name: str, rows: int = 4, columns: int = 32) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.ones(rows, columns).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.tensor(0.5),
    }


def plain(name: str, rows: int = 4, columns: int = 64) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.zeros(rows, columns, dtype=torch.bfloat16)}


def formats(checkpoint: StoredCheckpoint) -> dict[str, str]:
    return {name: weight.format.name for name, weight in checkpoint.weights.items()}


def test_int8_by_channel() -> None:
    tensors = int8("q")
    weight = stored_tensors.read(config(INT8), tensors).weights["q.weight"]
    want = tensors["q.weight"].float() * tensors["q.weight_scale"].float()[:, None]
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)
    assert (weight.parts[2].role, weight.parts[2].entry.name) == ("must_be_zero", "q.weight_zero_point")


@pytest.mark.parametrize(("dtype", "bits", "columns"), [("fp4", 4, 34), ("fp6_e2m3", 6, 36), ("fp8_e4m3", 8, 33)])
def test_a_last_block_that_is_not_full(dtype: str, bits: int, columns: int) -> None:
    """As Quark exports it: a scale for it, and the codes that are there."""
    codes = torch.arange(4 * columns * bits // 8).reshape(4, -1).remainder(100).to(torch.uint8)
    stored = codes.view(torch.float8_e4m3fn) if bits == 8 else codes
    tensors = {"q.weight": stored, "q.weight_scale": torch.tensor([[127, 129]] * 4, dtype=torch.uint8)}
    weight = stored_tensors.read(config({**MXFP4, "dtype": dtype}), tensors).weights["q.weight"]
    assert weight.shape == (4, columns)
    assert stored_tensors.converted(weight.parts[0], tensors).shape == (4, 8 * bits)
    padded = torch.nn.functional.pad(codes, (0, 8 * bits - codes.shape[1]))
    whole = {"q.weight": padded.view(stored.dtype), "q.weight_scale": tensors["q.weight_scale"]}
    want = stored_tensors.read(config({**MXFP4, "dtype": dtype}), whole).weights["q.weight"]
    got = stored_tensors.dequantized(weight, tensors)
    assert torch.equal(got, stored_tensors.dequantized(want, whole)[:, :columns])
    assert got.any()


def test_mxfp6_in_bytes_that_are_no_whole_codes() -> None:
    tensors = {"q.weight": torch.zeros(4, 25).byte(), "q.weight_scale": torch.full((4, 2), 127, dtype=torch.uint8)}
    with pytest.raises(
        CheckpointError, match=r"q\.weight has 25 bytes in a row, which are no whole number of codes of 6"
    ):
        stored_tensors.read(config({**MXFP4, "dtype": "fp6_e2m3"}), tensors)


def test_mxfp8_and_fp8_by_block() -> None:
    codes = torch.ones(4, 64).to(torch.float8_e4m3fn)
    tensors = {"q.weight": codes, "q.weight_scale": torch.full((4, 2), 128, dtype=torch.uint8)}
    weight = stored_tensors.read(config({**MXFP4, "dtype": "fp8_e4m3"}), tensors).weights["q.weight"]
    assert weight.format.name == "mxfp8"
    assert torch.equal(stored_tensors.dequantized(weight, tensors), torch.full((4, 64), 2.0))
    tensors = {"q.weight": codes, "q.weight_scale": torch.full((1, 1), 3.0)}
    block = {**FP8, "qscheme": "per_block", "block_size": [128, 128]}
    weight = stored_tensors.read(config(block), tensors).weights["q.weight"]
    assert weight.format.name == "fp8_block"
    assert torch.equal(stored_tensors.dequantized(weight, tensors), torch.full((4, 64), 3.0))


@pytest.mark.parametrize(("pack_method", "word"), [("reorder", 0x7531_6420), ("order", 0x7654_3210)])
def test_int4_over_fp8(pack_method: str, word: int) -> None:
    tensors = {
        "q.weight": torch.tensor([[word], [word]], dtype=torch.int32),
        "q.weight_scale": torch.tensor(0.5),
        "q.weight_scale_2": torch.tensor([2.0, 4.0]),
        "q.weight_zero_point_2": torch.zeros(1, dtype=torch.int32),
    }
    export = {"pack_method": pack_method, "weight_format": "real_quantized"}
    weight = stored_tensors.read(config([FP8, INT4], export=export), tensors).weights["q.weight"]
    assert weight.format.name == "int4_group0_f32"
    assert weight.step == 8
    assert [entry.name for entry in weight.values] == ["q.weight_scale"]
    want = torch.arange(8.0) * torch.tensor([[1.0], [2.0]])
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)


def test_a_name_comes_before_a_pattern_a_pattern_before_a_type_and_a_type_before_all() -> None:
    fields = {
        "layer_quant_config": {"*.down": layer(INT8), "a.down": layer(FP8), "*.z.*": layer(MXFP4)},
        "layer_type_quant_config": {"Linear": layer({**FP8, "qscheme": "per_channel", "ch_axis": 0})},
    }
    by_row = {"a.up.weight": torch.ones(4, 32).to(torch.float8_e4m3fn), "a.up.weight_scale": torch.ones(4)}
    tensors = {**fp8("a.down"), **int8("b.down"), **by_row, **mxfp4("b.z.up")}
    assert formats(stored_tensors.read(config(**fields), tensors)) == {
        "a.down.weight": "fp8_tensor",
        "b.down.weight": "int8_channel",
        "a.up.weight": "fp8_channel",
        "b.z.up.weight": "mxfp4",
    }
    without_types = {"layer_quant_config": fields["layer_quant_config"]}
    assert formats(stored_tensors.read(config(**without_types), mxfp4("a.up"))) == {"a.up.weight": "mxfp4"}


@pytest.mark.parametrize("pattern", ["a.lm_head", "*lm_head", "re:a\\.lm.*", "re:a"])
def test_an_excluded_module_is_plain(pattern: str) -> None:
    tensors = {**mxfp4("b.q"), **plain("a.lm_head")}
    checkpoint = stored_tensors.read(config(exclude=[pattern]), tensors)
    assert set(checkpoint.weights) == {"b.q.weight"}
    assert set(checkpoint.plain) == {"a.lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"a\.lm_head is stored quantized.*exclude has"):
        stored_tensors.read(config(exclude=[pattern]), mxfp4("a.lm_head"))


@pytest.mark.parametrize("pattern", ["lm_head", "a.lm", "re:lm_head", "lm*"])
def test_a_pattern_means_whole_names(pattern: str) -> None:
    assert stored_tensors.read(config(exclude=[pattern]), mxfp4("a.lm_head")).weights


def test_a_layer_whose_config_has_no_weight_is_plain() -> None:
    fields = {"layer_quant_config": {"*.q": layer(None)}}
    assert set(stored_tensors.read(config(**fields), {**mxfp4("b.k"), **plain("b.q")}).plain) == {"b.q.weight"}
    with pytest.raises(
        CheckpointError, match=r"b\.q is stored quantized.*layer_quant_config\.\*\.q quantizes no weight"
    ):
        stored_tensors.read(config(**fields), mxfp4("b.q"))


EXPERTS = "m.layers.0.mlp.experts"


def experts(skip: Sequence[str] = ()) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number in range(3):
        for name in ("gate_proj", "down_proj"):
            module = f"{EXPERTS}.{number}.{name}"
            tensors |= plain(module) if module in skip else mxfp4(module)
    return tensors


def test_all_experts_or_none() -> None:
    assert len(stored_tensors.read(config(), experts()).weights) == 6
    modules = [f"{EXPERTS}.{number}.{name}" for number in range(3) for name in ("gate_proj", "down_proj")]
    checkpoint = stored_tensors.read(config(exclude=[f"{EXPERTS}.*"]), experts(modules) | mxfp4("q"))
    assert set(checkpoint.weights) == {"q.weight"}


def test_one_excluded_expert_is_named() -> None:
    kept = f"{EXPERTS}.1.gate_proj"
    with pytest.raises(CheckpointError) as caught:
        stored_tensors.read(config(exclude=["lm_head", kept]), experts([kept]))
    assert f"{kept} is not quantized (quantization_config.exclude has {kept!r})" in str(caught.value)
    assert f"the experts of {EXPERTS} are one fused module" in str(caught.value)


def test_one_excluded_expert_that_is_stored_quantized_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj is stored quantized"):
        stored_tensors.read(config(exclude=[f"{EXPERTS}.2.down_proj"]), experts())


def test_experts_may_be_in_different_formats() -> None:
    """They can be quantized anew; kept as stored they are an error where the module is built."""
    fields = {"layer_quant_config": {"*.experts.2.*": layer(INT8)}}
    tensors = experts()
    for name in ("gate_proj", "down_proj"):
        tensors |= int8(f"{EXPERTS}.2.{name}")
    found = formats(stored_tensors.read(config(**fields), tensors))
    assert {found[f"{EXPERTS}.{expert}.gate_proj.weight"] for expert in (0, 1)} == {"mxfp4"}
    assert found[f"{EXPERTS}.2.gate_proj.weight"] == found[f"{EXPERTS}.2.down_proj.weight"] == "int8_channel"


@pytest.mark.parametrize(
    ("inputs", "described"),
    [
        ({**MXFP4, "is_dynamic": True}, ("mxfp4", True, "group", 32)),
        ({**MXFP4, "dtype": "fp6_e3m2", "is_dynamic": True}, ("mxfp6_e3m2", True, "group", 32)),
        ({**MXFP4, "dtype": "fp8_e4m3", "is_dynamic": True}, ("mxfp8", True, "group", 32)),
        ({**FP8, "is_dynamic": True}, ("fp8", True, "tensor", 0)),
        ({**FP8, "is_dynamic": False}, ("fp8", False, "tensor", 0)),
        ({**FP8, "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True}, ("fp8", True, "token", 0)),
        ({**FP8, "qscheme": "per_group", "group_size": 128, "is_dynamic": True}, ("fp8", True, "group", 128)),
        ({**INT8, "is_dynamic": True}, ("int8", True, "token", 0)),
        ([{**MXFP4, "is_dynamic": True}], ("mxfp4", True, "group", 32)),
    ],
)
def test_activations(inputs: dict[str, Any] | list[dict[str, Any]], described: tuple[str, bool, str, int]) -> None:
    tensors = {**mxfp4("q"), "q.input_scale": torch.tensor(1.0)}
    checkpoint = stored_tensors.read(config(inputs=inputs), tensors)
    found = checkpoint.weights["q.weight"].activations
    assert found is not None
    assert (found.format, found.dynamic, found.granularity, found.group) == described
    assert (found.scale is None) == found.dynamic == ("q.input_scale" in checkpoint.unused)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "uint4"}, r"global_quant_config\.weight\.dtype is 'uint4'; supported: 'fp4'"),
        ({"dtype": "mx"}, r"weight\.dtype is 'mx'"),
        ({"dtype": "int4"}, r"weight\.dtype is 'int4'"),
        ({"qscheme": "per_channel"}, r"weight\.qscheme is 'per_channel'; supported: 'per_group'"),
        ({"group_size": 16}, r"weight\.group_size is 16; supported: 32"),
        ({"scale_format": "float32"}, r"weight\.scale_format is 'float32'; supported: 'e8m0'"),
        ({"ch_axis": 0}, r"weight\.ch_axis is 0"),
        ({"is_dynamic": True}, r"weight\.is_dynamic is True"),
    ],
)
def test_a_wrong_field_of_the_weights_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config({**MXFP4, **changes}), mxfp4("q"))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({**INT8, "symmetric": False}, r"weight\.symmetric is False"),
        ({**INT8, "ch_axis": 1}, r"weight\.ch_axis is 1; supported: 0"),
        ({**INT8, "qscheme": "per_group"}, r"weight\.qscheme is 'per_group'"),
        ({**FP8, "qscheme": "per_block", "block_size": [64, 64]}, r"weight\.block_size is \[64, 64\]"),
        ([FP8, INT8], r"weight\.dtype is 'int8'; supported: 'int4'"),
        ([INT4, FP8], r"weight\.dtype is 'int4'; supported: 'fp8_e4m3'"),
        ([FP8, {**INT4, "ch_axis": 1}], r"weight\.ch_axis is 1"),
        ([FP8, FP8, INT4], r"weight is \[.*expected one object, or two"),
        ([], r"weight is \[\]"),
        ("fp8", r"global_quant_config\.weight is 'fp8'; expected an object"),
    ],
)
def test_a_wrong_kind_of_weights_is_named(weight: dict[str, Any] | list[Any] | str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(weight), mxfp4("q"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({**MXFP4, "is_dynamic": False}, r"input_tensors\.is_dynamic is False"),
        ({**INT8, "is_dynamic": False}, r"input_tensors\.is_dynamic is False"),
        ({**INT8, "is_dynamic": True, "symmetric": False}, r"input_tensors\.symmetric is False"),
        ({**FP8, "qscheme": "per_group", "group_size": 64, "is_dynamic": True}, r"input_tensors\.group_size is 64"),
        ({"dtype": "bfloat16"}, r"input_tensors\.dtype is 'bfloat16'"),
        ([MXFP4, FP8], r"input_tensors is \[.*expected one object"),
    ],
)
def test_a_wrong_field_of_the_activations_is_named(inputs: dict[str, Any] | list[Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(inputs=inputs), mxfp4("q"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"export": {"weight_format": "fake_quantized"}}, r"export\.weight_format is 'fake_quantized'"),
        (
            {"export": {"pack_method": "interleave"}},
            r"export\.pack_method is 'interleave'; supported: 'reorder', 'order'",
        ),
        ({"layer_type_quant_config": {"Conv2d": layer(INT8)}}, r"layer_type_quant_config is 'Conv2d'"),
        ({"layer_quant_config": ["a"]}, r"layer_quant_config is \['a'\]; expected an object"),
        ({"exclude": [1]}, r"exclude is \[1\]"),
        ({"global_quant_config": {**layer(MXFP4), "bias": INT8}}, r"global_quant_config\.bias is"),
        ({"global_quant_config": None}, "q is stored quantized.*quantizes no weight"),
    ],
)
def test_a_wrong_field_of_the_config_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), mxfp4("q"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (mxfp4("q") | {"q.weight": torch.zeros(4, 48).byte()}, r"q\.weight_scale has the shape \[4, 2\]; .* \[4, 3\]"),
        ({**mxfp4("q"), "q.weight_scale": torch.zeros(4, 3).byte()}, r"q\.weight_scale has the shape \[4, 3\]"),
        ({**mxfp4("q"), "q.weight_scale": torch.zeros(4, 2)}, r"q\.weight_scale is float32"),
        ({**mxfp4("q"), "q.input_rotation": torch.zeros(2, 2)}, r"q\.input_rotation .*nothing that would read it"),
        ({**mxfp4("q"), "q.weight": torch.zeros(4, 32)}, r"q\.weight is float32"),
        ({"q.weight": torch.zeros(4, 32).byte()}, r"q\.weight_scale is missing"),
        ({**mxfp4("k"), "norm.gain": torch.zeros(4).to(torch.float8_e5m2)}, r"norm\.gain \(torch\.float8_e5m2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(), tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2])
def test_another_fp8_is_an_error(dtype: torch.dtype) -> None:
    tensors = {**fp8("q"), "q.weight": torch.ones(4, 32).to(dtype)}
    with pytest.raises(CheckpointError, match=r"q\.weight is float8_.*takes float8_e4m3fn"):
        stored_tensors.read(config(FP8), tensors)
