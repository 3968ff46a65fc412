"""compressed-tensors: its formats, its groups and targets, and what is wrong with a config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored_tensors
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError
from quantload.schemes.stored.read import read_stored
from quantload.schemes.stored.weights import StoredCheckpoint
from safetensors.torch import load_file
from torch import Tensor

MADE = Path(__file__).parents[1] / "data" / "stored" / "ct_made"
FORMATS = {
    "mxfp6": "mxfp6_e2m3",
    "nvfp4": "nvfp4",
    "int4_group_asym": "int4_group32_bf16",
    "int8_group_asym": "int8_group32_bf16",
    "int8_group_sym": "int8_group32_bf16",
    "int4_channel_sym": "int4_group0_bf16",
    "int4_channel_asym": "int4_group0_bf16",
    "int8_channel_sym": "int8_group0_bf16",
    "float_tensor": "fp8_tensor",
    "float_block": "fp8_block",
    "int_tensor": "int8_channel",
    "naive_channel": "fp8_channel",
    "naive_int": "int8_channel",
    "w4a8": "int4_group32_bf16",
    "int8_asym": "int8_group0_bf16",
}


Made = tuple[dict[str, Any], dict[str, Tensor], StoredCheckpoint]


@pytest.fixture(scope="module")
def made() -> Made:
    config = json.loads((MADE / "config.json").read_text())["quantization_config"]
    tensors = load_file(MADE / "model.safetensors")
    return config, tensors, stored_tensors.read(config, tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_tool(made: Made, name: str) -> None:
    _, tensors, checkpoint = made
    weight = checkpoint.weights[f"model.{name}.weight"]
    want = torch.from_numpy(np.load(MADE / "expected.npz")[weight.name])
    assert weight.format.name == FORMATS[name]
    assert weight.shape == tuple(want.shape)
    # The tool divides by the scale of the tensor; kept is one divided by it, which is rounded once more.
    torch.testing.assert_close(
        stored_tensors.dequantized(weight, tensors), want, rtol=2.0**-22 if name == "nvfp4" else 0.0, atol=0.0
    )


def test_every_tensor_is_accounted_for(made: Made) -> None:
    _, tensors, checkpoint = made
    parts = [entry.name for weight in checkpoint.weights.values() for entry in weight.entries()]
    assert sorted([*parts, *checkpoint.plain, *checkpoint.unused]) == sorted(tensors)
    assert "model.nvfp4.input_global_scale" in checkpoint.unused


def test_only_what_the_tensors_do_not_say_is_read(
    made: Made,
) -> None:
    config, tensors, _ = made
    fetched = []
    entries = stored_tensors.entries(tensors)

    def read(entry: TensorEntry) -> Tensor:
        fetched.append(entry.name.removeprefix("model."))
        return tensors[entry.name]

    read_stored({"quantization_config": config}, entries, read)
    channels = ("int4_channel_asym", "int4_channel_sym", "int8_channel_sym")
    assert sorted(fetched) == [f"{name}.weight_shape" for name in channels]


def test_rows_of_a_packed_weight_come_in_words_of_zero_points(
    made: Made,
) -> None:
    _, _, checkpoint = made
    assert checkpoint.weights["model.int4_group_asym.weight"].step == 8
    assert checkpoint.weights["model.int8_group_asym.weight"].step == 4
    assert checkpoint.weights["model.int8_group_sym.weight"].step == 1
    assert checkpoint.weights["model.int8_group_sym.weight"].zero_point == 128.0
    assert checkpoint.weights["model.int4_channel_sym.weight"].zero_point == 8.0


W8A8 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": None,
    "format": "int-quantized",
}
PACKED: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "format": "pack-quantized",
}


def config(group: dict[str, Any] = W8A8, **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": copy.deepcopy(group)},
        "quantization_status": "compressed",
        "ignore": [],
        **fields,
    }


def linear(name: str, rows: int = 4, columns: int = 32) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.ones(rows, columns, dtype=torch.int8),
        f"{name}.weight_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
    }


def packed(name: str, rows: int = 8, columns: int = 64, group: int = 32, bits: int = 4) -> dict[str, Tensor]:
    return {
        f"{name}.weight_packed": torch.zeros(rows, columns * bits // 32, dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(rows, columns // group, dtype=torch.float16),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def test_an_ignored_module_is_plain() -> None:
    tensors = {**linear("a.q_proj"), "lm_head.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    checkpoint = stored_tensors.read(config(ignore=["lm_head"]), tensors)
    assert set(checkpoint.weights) == {"a.q_proj.weight"}
    assert set(checkpoint.plain) == {"lm_head.weight"}


@pytest.mark.parametrize("pattern", ["a.q_proj", "re:.*q_proj$", "re:a"])
def test_an_ignored_module_that_is_stored_quantized_is_an_error(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"a\.q_proj is stored quantized.*ignore has"):
        stored_tensors.read(config(ignore=[pattern]), linear("a.q_proj"))


def test_a_name_comes_before_a_pattern_and_both_before_linear() -> None:
    def with_bits(target: str, bits: int) -> dict[str, Any]:
        return {**copy.deepcopy(PACKED), "targets": [target], "weights": {**PACKED["weights"], "num_bits": bits}}

    groups = {"all": W8A8, "some": with_bits("re:.*mlp", 4), "one": with_bits("b.mlp.up", 8)}
    tensors = {**linear("a.q_proj"), **packed("a.mlp.up"), **packed("b.mlp.up", bits=8)}
    weights = stored_tensors.read(config() | {"config_groups": groups}, tensors).weights
    assert {name: weight.format.name for name, weight in weights.items()} == {
        "a.q_proj.weight": "int8_channel",
        "a.mlp.up.weight": "int4_group32_f16",
        "b.mlp.up.weight": "int8_group32_f16",
    }


def test_of_several_patterns_the_first_in_the_alphabet_counts() -> None:
    """As in compressed-tensors, whatever the order of the config."""
    groups = {"one": {**PACKED, "targets": ["re:b.*"]}, "two": {**W8A8, "targets": ["re:.*q_proj"]}}
    for order in (["one", "two"], ["two", "one"]):
        stored = config() | {"config_groups": {name: copy.deepcopy(groups[name]) for name in order}}
        weights = stored_tensors.read(stored, linear("b.q_proj")).weights
        assert weights["b.q_proj.weight"].format.name == "int8_channel"


def test_the_format_of_the_config_is_that_of_a_group_without_one() -> None:
    group = {name: value for name, value in W8A8.items() if name != "format"}
    assert stored_tensors.read(config(group, format="int-quantized"), linear("a.q_proj")).weights
    with pytest.raises(CheckpointError, match=r"group_0\.format is 'mixed-precision'"):
        stored_tensors.read(config(group, format="mixed-precision"), linear("a.q_proj"))


def test_zero_points_of_a_symmetric_quantization_are_to_be_checked() -> None:
    tensors = {**linear("a.q_proj"), "a.q_proj.weight_zero_point": torch.zeros(4, 1, dtype=torch.int8)}
    part = stored_tensors.read(config(), tensors).weights["a.q_proj.weight"].parts[-1]
    assert (part.role, part.entry.name) == ("must_be_zero", "a.q_proj.weight_zero_point")


def test_groups_in_the_order_of_the_columns() -> None:
    order = torch.arange(64, dtype=torch.int32) // 32
    group = {**PACKED, "weights": {**PACKED["weights"], "actorder": "group"}}
    tensors = {**packed("a.q_proj"), "a.q_proj.weight_g_idx": order}
    assert stored_tensors.read(config(group), tensors).weights
    tensors["a.q_proj.weight_g_idx"] = order.flip(0)
    with pytest.raises(CheckpointError, match=r"a\.q_proj\.weight_g_idx.*actorder is 'group'"):
        stored_tensors.read(config(group), tensors)


def test_cache_scales_are_not_used_and_said_so() -> None:
    tensors = {**linear("m.self_attn.k_proj"), "m.self_attn.k_scale": torch.ones(1)}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    unused = stored_tensors.read(config(kv_cache_scheme=cache), tensors).unused
    assert unused == {"m.self_attn.k_scale": "attention and its cache are not quantized here"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, r"group_0\.weights\.num_bits is 3; supported: 4, 8"),
        ({"num_bits": True}, r"group_0\.weights\.num_bits is True"),
        ({"type": "float"}, r"group_0\.weights\.type is 'float'; supported: 'int'"),
        ({"strategy": "tensor"}, r"group_0\.weights\.strategy is 'tensor'; supported: 'group', 'channel'"),
        ({"group_size": 48}, r"group_0\.weights\.group_size is 48; supported: 16, 32, 64, 128, 256"),
        ({"group_size": None}, r"group_0\.weights\.group_size is None"),
        ({"symmetric": "yes"}, r"group_0\.weights\.symmetric is 'yes'"),
        ({"dynamic": True}, r"group_0\.weights\.dynamic is True"),
        ({"shuffle": 1}, r"group_0\.weights\.shuffle is 1, a field that is not known"),
    ],
)
def test_a_wrong_field_of_packed_weights_is_named(changes: dict[str, Any], message: str) -> None:
    group = {**PACKED, "weights": {**PACKED["weights"], **changes}}
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(group), packed("a.q_proj"))


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("written", "weights", "message"),
    [
        ("float-quantized", {**FLOAT, "num_bits": 4}, r"weights\.num_bits is 4; supported: 8"),
        ("float-quantized", {**FLOAT, "type": "int"}, r"weights\.type is 'int'; supported: 'float'"),
        ("float-quantized", {**FLOAT, "symmetric": False}, r"weights\.symmetric is False"),
        ("float-quantized", {**FLOAT, "strategy": "group", "group_size": 64}, r"weights\.strategy is 'group'"),
        (
            "float-quantized",
            {**FLOAT, "strategy": "block", "block_structure": [64, 64]},
            r"weights\.block_structure is \[64, 64\]; supported: \[128, 128\]",
        ),
        ("int-quantized", FLOAT, r"weights\.type is 'float'; supported: 'int'"),
        ("mxfp4-pack-quantized", {**FLOAT, "group_size": 32}, r"weights\.num_bits is 8; supported: 4"),
        ("mxfp8-quantized", {**FLOAT, "group_size": 64}, r"weights\.group_size is 64; supported: 32"),
        ("mxfp6-pack-quantized", {**FLOAT, "num_bits": 6, "symmetric": False}, r"weights\.symmetric is False"),
        ("nvfp4-pack-quantized", {**FLOAT, "num_bits": 4, "group_size": 32}, r"weights\.group_size is 32"),
        ("marlin-24", FLOAT, r"group_0\.format is 'marlin-24'; supported: 'mxfp4-pack-quantized'"),
        ("dense", FLOAT, r"group_0\.format is 'dense'"),
    ],
)
def test_a_wrong_field_of_a_format_is_named(written: str, weights: dict[str, Any], message: str) -> None:
    group = {"targets": ["Linear"], "weights": weights, "format": written}
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(group), linear("a.q_proj"))


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 4}, r"input_activations\.num_bits is 4"),
        ({"symmetric": False}, r"input_activations\.symmetric is False"),
        ({"dynamic": False}, r"input_activations\.dynamic is False"),
        ({"dynamic": "local"}, r"input_activations\.dynamic is 'local'"),
        ({"strategy": "group", "group_size": 128}, r"input_activations\.strategy is 'group'"),
        ({"type": "float", "strategy": "group", "group_size": 64}, r"input_activations\.group_size is 64"),
        ({"type": "float", "strategy": "group", "group_size": 32}, r"input_activations\.scale_dtype is None"),
        ({"type": "float", "num_bits": 4}, r"input_activations\.strategy is 'token'"),
        ({"type": "float", "strategy": "attn_head"}, r"input_activations\.strategy is 'attn_head'"),
        ({"extra": 1}, r"input_activations\.extra is 1"),
    ],
)
def test_a_wrong_field_of_the_activations_is_named(changes: dict[str, Any], message: str) -> None:
    group = {**W8A8, "input_activations": {**TOKEN, **changes}}
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(group), linear("a.q_proj"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_status": "frozen"}, r"quantization_status is 'frozen'; supported: 'compressed'"),
        ({"format": "pickled"}, r"quantization_config\.format is 'pickled'"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, r"transform_config\.config_groups"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format is 'sparse-24-bitmask'"),
        ({"moe_sparsity_config": {"method": "prune"}}, r"moe_sparsity_config is"),
        ({"config_groups": {}}, r"config_groups is \{\}"),
        ({"config_groups": {"W8A8": ["Linear"]}}, r"config_groups\.W8A8 is \['Linear'\]; expected an object"),
        ({"config_groups": {"group_0": None}}, r"config_groups\.group_0 is None"),
        ({"config_groups": {"group_0": {**W8A8, "targets": "Linear"}}}, r"group_0\.targets is 'Linear'"),
        ({"ignore": "lm_head"}, r"quantization_config\.ignore is 'lm_head'; expected a list of strings"),
        ({"ignore": ["re:("]}, r"quantization_config\.ignore has 're:\('"),
    ],
)
def test_a_wrong_field_of_the_config_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), linear("a.q_proj"))


def test_transforms_and_sparsity_that_say_nothing_are_fine() -> None:
    fields: dict[str, Any] = {"transform_config": {"config_groups": {}}, "sparsity_config": {"format": "dense"}}
    assert stored_tensors.read(config(**fields), linear("a.q_proj")).weights


def test_a_module_without_a_target_is_an_error() -> None:
    group = {**W8A8, "targets": ["re:.*k_proj"]}
    with pytest.raises(CheckpointError, match=r"a\.q_proj is stored quantized.*config_groups has no target"):
        stored_tensors.read(config(group), linear("a.q_proj"))


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("group", "tensors", "message"),
    [
        (W8A8, without(linear("q"), "q.weight_scale"), r"q\.weight_scale is missing"),
        (W8A8, without(linear("q"), "q.weight"), r"q\.weight is missing"),
        (W8A8, {**linear("q"), "q.weight_scale": torch.ones(3, 1)}, r"q\.weight_scale has the shape \[3, 1\]"),
        (W8A8, {**linear("q"), "q.weight_scale": torch.ones(4, 1).int()}, r"q\.weight_scale is int32"),
        (W8A8, {**linear("q"), "q.weight": torch.ones(4, 32)}, r"q\.weight is float32"),
        (W8A8, {**linear("q"), "q.weight": torch.ones(2, 4, 32).char()}, r"q\.weight has the shape \[2, 4, 32\]"),
        (W8A8, {**linear("q"), "q.weight_global_scale": torch.ones(1)}, r"q\.weight_global_scale .*nothing that would"),
        (W8A8, {**linear("q"), "n.weight_scale": torch.ones(1)}, r"n\.weight is missing"),
        (PACKED, {**packed("q"), "q.weight": torch.ones(8, 64)}, r"q\.weight is stored twice"),
        (PACKED, {**packed("q", columns=80, group=16)}, r"q\.weight_packed has room for 80 codes .* groups for 160"),
        (PACKED, without(packed("q"), "q.weight_scale"), r"q\.weight_scale is missing"),
        (PACKED, {**packed("q"), "q.weight_scale": torch.ones(7, 2)}, r"q\.weight_scale has the shape \[7, 2\]"),
        (PACKED, {**packed("q"), "q.weight_shape": torch.ones(3).int()}, r"q\.weight_shape has the shape \[3\]"),
        (PACKED, {**packed("q"), "q.weight_shape": torch.ones(2)}, r"q\.weight_shape is float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(group: dict[str, Any], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(group), tensors)


def test_a_packed_shape_that_does_not_fit_is_named() -> None:
    group = {**PACKED, "weights": {**PACKED["weights"], "strategy": "channel", "group_size": None}}
    tensors = packed("q", group=64)
    tensors["q.weight_shape"] = torch.tensor([8, 56])
    with pytest.raises(CheckpointError, match=r"q\.weight_shape says \[8, 56\]"):
        stored_tensors.read(config(group), tensors)


def test_a_shape_that_groups_say_too_is_to_be_checked() -> None:
    tensors = packed("q") | without(packed("k"), "k.weight_shape")
    weights = stored_tensors.read(config(PACKED), tensors).weights
    assert [part.role for part in weights["k.weight"].parts] == ["codes", "scale"]
    part = weights["q.weight"].parts[-1]
    assert (part.role, part.only_checked, part.entry.name) == ("shape", True, "q.weight_shape")
    assert stored_tensors.matrix(part, tensors).tolist() == [[8, 64]]


def test_packed_zero_points_of_rows_that_do_not_fill_the_last_word() -> None:
    group = {**PACKED, "weights": {**PACKED["weights"], "symmetric": False}}
    zeros = torch.tensor([[0x76543210, 0], [0x0000BA98, 0]], dtype=torch.int32)
    tensors = {**packed("q", rows=12), "q.weight_zero_point": zeros}
    weight = stored_tensors.read(config(group), tensors).weights["q.weight"]
    (part,) = (part for part in weight.parts if part.role == "zero_point")
    assert (weight.step, part.block) == (1, 0)
    assert part.convert is not None
    in_one_row = part.convert(zeros.reshape(1, -1))
    assert in_one_row.tolist() == [[float(row), 0.0] for row in range(12)]
    assert torch.equal(stored_tensors.dequantized(weight, tensors)[:, 0], -torch.arange(12.0))


def test_a_static_scale_that_is_missing_and_one_that_is_there() -> None:
    group = {**W8A8, "input_activations": {**TOKEN, "strategy": "tensor", "dynamic": False}}
    lacking = stored_tensors.read(config(group), linear("q")).weights["q.weight"].activations
    assert lacking is not None
    assert lacking.lacks_scale
    tensors = {**linear("q"), "q.input_scale": torch.ones(1)}
    activations = stored_tensors.read(config(group), tensors).weights["q.weight"].activations
    assert activations is not None
    assert activations.scale is not None
    assert (activations.format, activations.dynamic, activations.scale.name) == ("int8", False, "q.input_scale")
