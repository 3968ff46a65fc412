"""AWQ: linear layers and experts in the GEMM layout, and what is wrong with a config."""

from __future__ import annotations

from typing import Any

import pytest
import stored_tensors
import torch
from quantload.errors import CheckpointError
from torch import Tensor


def config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **fields}


def linear(name: str, rows: int = 16, columns: int = 64, group: int = 32, zero_point: bool = True) -> dict[str, Tensor]:
    """Codes of all sevens and zero points of all fives, in scales of the row's number."""
    tensors = {
        f"{name}.qweight": torch.full((columns, rows // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.arange(1, rows + 1).half().repeat(columns // group, 1),
    }
    if zero_point:
        tensors[f"{name}.qzeros"] = torch.full((columns // group, rows // 8), 0x55555555, dtype=torch.int32)
    return tensors


@pytest.mark.parametrize(
    ("fields", "group", "zero_point", "value", "fmt", "step"),
    [
        ({}, 32, True, 2.0, "int4_group32_f16", 32),
        ({"zero_point": False}, 32, False, -1.0, "int4_group32_f16", 32),
        ({"bits": 4.0, "group_size": 32.0}, 32, True, 2.0, "int4_group32_f16", 32),
        ({"group_size": 64, "version": "GEMM"}, 64, True, 2.0, "int4_group64_f16", 64),
        ({"group_size": -1}, 64, True, 2.0, "int4_group0_f16", 2),
        ({"group_size": -1, "zero_point": False}, 64, False, -1.0, "int4_group0_f16", 2),
    ],
)
def test_layouts(fields: dict[str, Any], group: int, zero_point: bool, value: float, fmt: str, step: int) -> None:
    tensors = linear("a.q", group=group, zero_point=zero_point)
    weight = stored_tensors.read(config(**fields), tensors).weights["a.q.weight"]
    assert (weight.format.name, weight.along, weight.step) == (fmt, "columns", step)
    assert weight.shape == (16, 64)
    assert type(weight.step) is int
    want = value * torch.arange(1.0, 17.0)[:, None].expand(16, 64)
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)
    assert len(weight.parts) == (3 if zero_point else 2)


def test_experts_are_weights_of_their_own() -> None:
    tensors: dict[str, Tensor] = {}
    for number in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors |= linear(f"m.mlp.experts.{number}.{name}")
    tensors["m.mlp.gate.weight"] = torch.zeros(2, 64, dtype=torch.float16)
    checkpoint = stored_tensors.read(config(modules_to_not_convert=["gate"]), tensors)
    assert len(checkpoint.weights) == 6
    assert "m.mlp.experts.1.gate_proj.weight" in checkpoint.weights
    assert set(checkpoint.plain) == {"m.mlp.gate.weight"}


def test_biases_are_plain() -> None:
    tensors = {**linear("a.q"), "a.q.bias": torch.zeros(16, dtype=torch.float16)}
    assert set(stored_tensors.read(config(), tensors).plain) == {"a.q.bias"}


@pytest.mark.parametrize("name", ["visual", "visual.q", "q", "vis.*", "model"])
def test_a_module_that_is_not_converted_must_be_plain(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"q is stored quantized.*modules_to_not_convert has '{name}'".replace("*'", r"\*'")
    ):
        stored_tensors.read(config(modules_to_not_convert=[name]), linear("visual.q" if name != "model" else "model.q"))


@pytest.mark.parametrize("name", ["gate", "mlp.gate", "m.mlp.gat", "proj"])
def test_a_name_means_whole_parts_of_names(name: str) -> None:
    checkpoint = stored_tensors.read(config(modules_to_not_convert=[name]), linear("m.mlp.gate_proj"))
    assert set(checkpoint.weights) == {"m.mlp.gate_proj.weight"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, r"quantization_config\.bits is 8; supported: 4"),
        ({"bits": None}, r"quantization_config\.bits is None"),
        ({"group_size": 48}, r"quantization_config\.group_size is 48; supported: 16, 32, 64, 128, 256, -1"),
        ({"group_size": 0}, r"quantization_config\.group_size is 0"),
        ({"zero_point": 1}, r"quantization_config\.zero_point is 1; supported: True, False"),
        ({"version": "gemv"}, r"quantization_config\.version is 'gemv'; supported: 'gemm'"),
        ({"pack_method": "order"}, r"quantization_config\.pack_method is 'order'"),
        ({"modules_to_not_convert": "q"}, r"modules_to_not_convert is 'q'; expected a list"),
        ({"modules_to_not_convert": ["("]}, r"modules_to_not_convert has '\(', which is not a regular expression"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), linear("a.q"))


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in linear("a.q").items() if key != name}


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, without("a.q.scales"), r"a\.q\.scales is missing"),
        ({}, without("a.q.qzeros"), r"a\.q\.qzeros is missing"),
        ({}, without("a.q.qweight"), r"a\.q\.qweight is missing"),
        ({"zero_point": False}, linear("a.q"), r"a\.q\.qzeros .*nothing that would read it"),
        ({"group_size": 64}, linear("a.q"), r"a\.q\.scales has the shape \[2, 16\].*needs \[1, 16\]"),
        ({"group_size": 128}, linear("a.q"), r"a\.q\.qweight has 64 rows.* a multiple of 128"),
        ({"group_size": -1}, linear("a.q", columns=33, group=33), r"a\.q\.qweight has 33 rows.* a multiple of 2"),
        ({}, {**linear("a.q"), "a.q.qzeros": torch.zeros(2, 3).int()}, r"a\.q\.qzeros has the shape \[2, 3\]"),
        ({}, {**linear("a.q"), "a.q.scales": torch.zeros(2, 16).int()}, r"a\.q\.scales is int32"),
        ({}, {**linear("a.q"), "a.q.qweight": torch.zeros(64, 2).long()}, r"a\.q\.qweight is int64"),
        ({}, {**linear("a.q"), "a.q.weight": torch.zeros(16, 64)}, r"a\.q\.weight is stored twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(fields: dict[str, Any], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), tensors)
