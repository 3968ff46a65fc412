"""The bytes are those AMD Quark exports from the same BF16 checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import raw_checkpoint
import torch
from quantload import load_quantized
from quantload.kernels.reference.mx import unpack_fp6
from torch import Tensor, nn

BLOCK = 32


def canonical(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """One code an element with -0 mapped to 0, and scales with those of all-zero blocks set to 0."""
    fp6 = packed.shape[-1] == scales.shape[-1] * BLOCK * 6 // 8
    codes = unpack_fp6(packed) if fp6 else torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    codes = torch.where(codes == (0x20 if fp6 else 8), 0, codes)
    empty = (codes.unflatten(-1, (-1, BLOCK)) == 0).all(-1)
    return codes, scales.masked_fill(empty, 0)


def exported_layout(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names of Quark's export: one tensor an expert, gate and up apart."""
    for name, parameter in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        if ".experts." not in name:
            yield name, parameter
            continue
        suffix = "weight_scale" if last.endswith("_scale") else "weight"
        for expert, weight in enumerate(parameter):
            if last.startswith("gate_up_proj"):
                gate, up = weight.chunk(2)
                yield f"{layer}.{expert}.gate_proj.{suffix}", gate
                yield f"{layer}.{expert}.up_proj.{suffix}", up
            else:
                yield f"{layer}.{expert}.down_proj.{suffix}", weight


@pytest.mark.parametrize(
    ("original", "export", "scheme", "quantized_count"),
    [
        ("bf16_llama", "quark_llama_mxfp4", "quark_mxfp4", 2 * 7),
        ("bf16_qwen3moe", "quark_qwen3moe_mxfp4", "quark_mxfp4", 2 * (4 + 4 * 3)),
        ("bf16_llama", "quark_llama_mxfp6_e2m3", "mxfp6_e2m3", 2 * 7),
        ("bf16_llama", "quark_llama_mxfp6_e3m2", "mxfp6_e3m2", 2 * 7),
    ],
)
def test_bytes_equal_quark(original: str, export: str, scheme: str, quantized_count: int, golden: Path) -> None:
    want = raw_checkpoint.read(golden / export)
    got = {name: tensor.detach() for name, tensor in exported_layout(load_quantized(golden / original, scheme))}
    assert set(got) == set(want)
    quantized = [name.removesuffix("_scale") for name in want if name.endswith("_scale")]
    assert len(quantized) == quantized_count
    for name in quantized:
        got_codes, got_scales = canonical(got[name].view(torch.uint8), got[f"{name}_scale"].view(torch.uint8))
        codes, scales = canonical(want[name], want[f"{name}_scale"])
        assert torch.equal(got_codes, codes), name
        assert torch.equal(got_scales, scales), name
    for name in set(want) - set(quantized) - {f"{name}_scale" for name in quantized}:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


def test_canonical_form_of_codes_and_scales() -> None:
    codes = torch.tensor([[0x88] * 16 + [0x81] + [0x08] * 15], dtype=torch.uint8)
    scales = torch.tensor([[1, 120]], dtype=torch.uint8)
    got_codes, got_scales = canonical(codes, scales)
    assert got_codes.tolist() == [[0] * BLOCK + [1] + [0] * (BLOCK - 1)]
    assert got_scales.tolist() == [[0, 120]]
    sixes = torch.tensor([[0x20, 0x08, 0x82] * 8 + [0x01, 0x08, 0x82] + [0] * 21], dtype=torch.uint8)
    got_codes, got_scales = canonical(sixes, scales)
    assert got_codes.tolist() == [[0] * BLOCK + [1] + [0] * (BLOCK - 1)]
    assert got_scales.tolist() == [[0, 120]]
