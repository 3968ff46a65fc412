"""GPTQ: linear layers and experts of four and eight bits, modules with settings of their own, and what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import stored_tensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.errors import CheckpointError
from torch import Tensor


def config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **fields}


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [n, m] to int32 words [n / (32 / bits), m], the first in the lowest bits, as GPTQ packs columns."""
    per_word = 32 // bits
    words = torch.zeros(-(-numbers.shape[0] // per_word), numbers.shape[1], dtype=torch.int64)
    for place, row in enumerate(numbers.long()):
        words[place // per_word] |= row << bits * (place % per_word)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def linear(
    name: str,
    rows: int = 16,
    columns: int = 64,
    group: int = 32,
    bits: int = 4,
    *,
    first_zero: int = 1,
    ordered: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer with random codes, zero points and scales, and what they stand for, [N, K].

    One is subtracted from all zero points of a word at once, as GPTQModel does: below 0 it borrows from the next.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
    groups = -(-columns // group)
    zeros = torch.randint(0, 1 << bits, (groups, rows), generator=generator)
    ones = sum(1 << place for place in range(0, 32, bits))
    scales = (torch.rand(groups, rows, generator=generator) + 0.5).to(dtype)
    tensors = {
        f"{name}.qweight": packed(codes, bits),
        f"{name}.qzeros": packed(zeros.t(), bits).t().clone(memory_format=torch.contiguous_format) - first_zero * ones,
        f"{name}.scales": scales,
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }
    if ordered:
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0)
    own = torch.arange(columns) // group
    return tensors, ((codes - zeros[own]) * scales.float()[own]).t()


def test_a_word_by_hand() -> None:
    """Column c of row r has the code c; the zero point of row r is r + 1."""
    tensors = {
        "q.qweight": torch.tensor([[0x76543210, 0x76543210]] * 2, dtype=torch.int32),
        "q.qzeros": torch.tensor([[0x10]], dtype=torch.int32),
        "q.scales": torch.tensor([[1.0, 2.0]]).half(),
    }
    weight = stored_tensors.read(config(group_size=16), tensors).weights["q.weight"]
    columns = torch.arange(16.0) % 8
    want = torch.stack((columns - 1, 2 * (columns - 2)))
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)


@pytest.mark.parametrize(
    ("fields", "how", "fmt", "step"),
    [
        ({}, {}, "int4_group32_f16", 32),
        ({"bits": 8}, {"bits": 8}, "int8_group32_f16", 32),
        ({"group_size": 64, "sym": False}, {"group": 64, "dtype": torch.bfloat16}, "int4_group64_bf16", 64),
        ({"group_size": -1, "desc_act": True}, {"group": 64}, "int4_group0_f16", 8),
        ({"group_size": -1, "bits": 8}, {"group": 64, "bits": 8, "rows": 10}, "int8_group0_f16", 4),
        ({"checkpoint_format": "gptq_v2"}, {"first_zero": 0}, "int4_group32_f16", 32),
        ({}, {"columns": 72}, "int4_group32_f16", 32),
        ({"group_size": 128}, {"group": 128}, "int4_group128_f16", 128),
        ({"checkpoint_format": "gptq", "is_marlin_format": False}, {"rows": 13}, "int4_group32_f16", 32),
    ],
)
def test_layouts(fields: dict[str, Any], how: dict[str, Any], fmt: str, step: int) -> None:
    tensors, want = linear("a.q", **how)
    weight = stored_tensors.read(config(**fields), tensors).weights["a.q.weight"]
    assert (weight.format.name, weight.along, weight.step, weight.shape) == (fmt, "columns", step, tuple(want.shape))
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)


@given(
    rows=st.integers(1, 20),
    words=st.integers(1, 50),
    group=st.sampled_from([16, 32, 128]),
    bits=st.sampled_from([4, 8]),
    first_zero=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_any_size(rows: int, words: int, group: int, bits: int, first_zero: int, seed: int) -> None:
    tensors, want = linear("q", rows, words * 32 // bits, group, bits, first_zero=first_zero, seed=seed)
    fields = {"bits": bits, "group_size": group, "checkpoint_format": "gptq" if first_zero else "gptq_v2"}
    weight = stored_tensors.read(config(**fields), tensors).weights["q.weight"]
    assert torch.equal(stored_tensors.dequantized(weight, tensors), want)


def test_experts_biases_and_layers_without_codes() -> None:
    tensors, _ = linear("m.mlp.experts.0.gate_proj")
    tensors |= linear("m.mlp.experts.1.gate_proj")[0]
    tensors |= {"m.mlp.experts.0.gate_proj.bias": torch.zeros(16), "lm_head.weight": torch.zeros(2, 64)}
    checkpoint = stored_tensors.read(config(), tensors)
    assert set(checkpoint.weights) == {f"m.mlp.experts.{number}.gate_proj.weight" for number in range(2)}
    assert set(checkpoint.plain) == {"m.mlp.experts.0.gate_proj.bias", "lm_head.weight"}


def test_modules_with_settings_of_their_own() -> None:
    dynamic = {"+:.*\\.down": {"bits": 8, "group_size": 64}, "-:.*\\.o": {}, ".*\\.up": {"group_size": 16}}
    tensors = linear("a.q")[0] | linear("a.down", bits=8, group=64)[0] | linear("a.up", group=16)[0]
    checkpoint = stored_tensors.read(config(dynamic=dynamic), {**tensors, "a.o.weight": torch.zeros(4, 4)})
    formats = {name: weight.format.name for name, weight in checkpoint.weights.items()}
    assert formats == {
        "a.q.weight": "int4_group32_f16",
        "a.down.weight": "int8_group64_f16",
        "a.up.weight": "int4_group16_f16",
    }
    with pytest.raises(CheckpointError, match=r"a\.o is stored quantized.*quantization_config\.dynamic has '-:"):
        stored_tensors.read(config(dynamic=dynamic), linear("a.o")[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, r"quantization_config\.bits is 3; supported: 4, 8"),
        ({"bits": None}, r"quantization_config\.bits is None"),
        ({"group_size": 48}, r"quantization_config\.group_size is 48; supported: 16, 32, 64, 128, 256, -1"),
        ({"desc_act": 1}, r"quantization_config\.desc_act is 1; supported: True, False"),
        ({"checkpoint_format": "marlin"}, r"quantization_config\.checkpoint_format is 'marlin'; supported: 'gptq'"),
        ({"is_marlin_format": True}, r"quantization_config\.is_marlin_format is True"),
        ({"dynamic": {"+:(": {}}}, r"quantization_config\.dynamic has '"),
        ({"dynamic": {"+:x": {"bits": 2}}}, r"quantization_config\.dynamic\.\+:x\.bits is 2; supported: 4, 8"),
        ({"dynamic": ["x"]}, r"quantization_config\.dynamic is \['x'\]; expected an object"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), linear("a.q")[0])


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in linear("a.q")[0].items() if key != name}


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, without("a.q.scales"), r"a\.q\.scales is missing"),
        ({}, without("a.q.qzeros"), r"a\.q\.qzeros is missing"),
        ({}, without("a.q.qweight"), r"a\.q\.qweight is missing"),
        ({"desc_act": True}, without("a.q.g_idx"), r"a\.q\.g_idx is missing"),
        ({"group_size": 64}, linear("a.q")[0], r"a\.q\.scales has the shape \[2, 16\].*needs \[1, 16\]"),
        ({"group_size": 128}, linear("a.q")[0], r"a\.q\.scales has the shape \[2, 16\].*needs \[1, 16\]"),
        ({}, linear("a.q", columns=72)[0] | {"a.q.scales": torch.ones(2, 16)}, r"a\.q\.scales .*needs \[3, 16\]"),
        ({"bits": 8}, linear("a.q")[0], r"a\.q\.scales has the shape \[2, 16\].*needs \[1, 16\]"),
        ({}, {**linear("a.q")[0], "a.q.g_idx": torch.zeros(63).int()}, r"a\.q\.g_idx has the shape \[63\]"),
        ({}, {**linear("a.q")[0], "a.q.qweight": torch.zeros(8, 16).long()}, r"a\.q\.qweight is int64"),
        ({}, {**linear("a.q")[0], "a.q.weight": torch.zeros(16, 64)}, r"a\.q\.weight is stored twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(fields: dict[str, Any], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_tensors.read(config(**fields), tensors)


def test_an_order_by_activations_is_kept_for_when_it_is_read() -> None:
    tensors, _ = linear("a.q", ordered=True)
    weight = stored_tensors.read(config(desc_act=True), tensors).weights["a.q.weight"]
    (order,) = (part for part in weight.parts if part.only_checked)
    assert (order.role, order.entry.name) == ("order", "a.q.g_idx")
