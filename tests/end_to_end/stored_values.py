"""What the weights of the golden quantized checkpoints stand for, worked out from the raw tensors format by format.

Written from the formats' own descriptions, with nothing of quantload: an oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import raw_checkpoint
import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = Mapping[str, Tensor]


def stored_values(folder: Path) -> dict[str, Tensor]:
    """float32 weights by the name of the layer that has them, in the orientation they are stored in."""
    tensors = raw_checkpoint.read(folder)
    method = _METHODS[folder.name.removeprefix("quark_").removeprefix("ct_").removeprefix("native_")]
    return dict(method(tensors))


def _layers(tensors: Tensors, last: str) -> Iterator[str]:
    return (name.removesuffix(f".{last}") for name in tensors if name.endswith(f".{last}"))


def _e2m1(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    return torch.tensor(E2M1 + tuple(-v for v in E2M1))[nibbles]


def _e8m0(scales: Tensor, columns: int) -> Tensor:
    return torch.exp2(scales.double() - 127).float().repeat_interleave(columns // scales.shape[-1], -1)


def _mxfp4(codes: str, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for layer in _layers(tensors, "weight_scale"):
        values = _e2m1(tensors[f"{layer}.{codes}"])
        yield layer, values * _e8m0(tensors[f"{layer}.weight_scale"], values.shape[-1])


def _mxfp6(exponent_bits: int, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    mantissa_bits, bias = 5 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    for layer in _layers(tensors, "weight_scale"):
        triples = tensors[f"{layer}.weight"].unflatten(-1, (-1, 3)).int()
        word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        codes = torch.stack((word, word >> 6, word >> 12, word >> 18), -1).flatten(-2) & 63
        exponent, mantissa = (codes & 31) >> mantissa_bits, (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
        subnormal = exponent == 0
        magnitude = torch.where(
            subnormal, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * torch.exp2(exponent.float() - bias)
        )
        values = torch.where(codes >= 32, -magnitude, magnitude)
        yield layer, values * _e8m0(tensors[f"{layer}.weight_scale"], values.shape[-1])


def _mxfp8(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for layer in _layers(tensors, "weight_scale"):
        values = tensors[f"{layer}.weight"].float()
        yield layer, values * _e8m0(tensors[f"{layer}.weight_scale"], values.shape[-1])


def _scaled(scale: str, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Codes times a scale for the tensor, for each row, or for each block of 128 x 128."""
    for layer in _layers(tensors, scale):
        values, scales = tensors[f"{layer}.weight"].float(), tensors[f"{layer}.{scale}"].float()
        if scales.dim() == 1:
            scales = scales[:, None]
        if scales.dim() == 2 and scales.shape[1] * 128 == values.shape[1] and scales.shape[0] * 128 == values.shape[0]:
            scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        yield layer, values * scales


def _int4_fp8(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for layer in _layers(tensors, "weight_scale_2"):
        words = tensors[f"{layer}.weight"]
        nibbles = torch.stack([(words >> (4 * AWQ_ORDER.index(i))) & 15 for i in range(8)], -1).flatten(-2)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
        scales = tensors[f"{layer}.weight_scale"] * tensors[f"{layer}.weight_scale_2"]
        yield layer, codes * scales[:, None]


def _packed(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for layer in _layers(tensors, "weight_packed"):
        words, scales = tensors[f"{layer}.weight_packed"], tensors[f"{layer}.weight_scale"].float()
        codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2)
        yield layer, (codes - 8).float() * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def _awq(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    def unpacked(words: Tensor) -> Tensor:
        return torch.stack([(words >> (4 * AWQ_ORDER.index(i))) & 15 for i in range(8)], -1).flatten(-2).float()

    for layer in _layers(tensors, "qweight"):
        codes, scales = unpacked(tensors[f"{layer}.qweight"]), tensors[f"{layer}.scales"].float()
        group = codes.shape[0] // scales.shape[0]
        zeros = unpacked(tensors[f"{layer}.qzeros"]).repeat_interleave(group, 0)
        yield layer, ((codes - zeros) * scales.repeat_interleave(group, 0)).T


def _gptq(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for layer in _layers(tensors, "qweight"):
        words, scales = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"].float()
        codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1).float()
        zeros = tensors[f"{layer}.qzeros"] + 0x11111111
        zeros = torch.stack([(zeros >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2).float()
        group = tensors[f"{layer}.g_idx"].long()
        yield layer, ((codes - zeros[group]) * scales[group]).T


def _gptoss(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name in tensors:
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            values = _e2m1(tensors[name].flatten(-2))
            yield name.removesuffix("_blocks"), values * _e8m0(scales, values.shape[-1])


_METHODS = {
    "llama_mxfp4": lambda t: _mxfp4("weight" if any(n.endswith("q_proj.weight") for n in t) else "weight_packed", t),
    "qwen3moe_mxfp4": lambda t: _mxfp4("weight", t),
    "llama_mxfp6_e2m3": lambda t: _mxfp6(2, t),
    "llama_mxfp6_e3m2": lambda t: _mxfp6(3, t),
    "llama_mxfp8a16": _mxfp8,
    "llama_fp8": lambda t: _scaled("weight_scale", t),
    "llama_ptpc_fp8": lambda t: _scaled("weight_scale", t),
    "llama_int8": lambda t: _scaled("weight_scale", t),
    "llama_fp8_block": lambda t: _scaled("weight_scale", t),
    "llama_fp8_dynamic": lambda t: _scaled("weight_scale", t),
    "llama_w8a8": lambda t: _scaled("weight_scale", t),
    "llama_blockfp8": lambda t: _scaled("weight_scale_inv", t),
    "llama_int4_fp8": _int4_fp8,
    "llama_w4a16": _packed,
    "llama_gptq": _gptq,
    "llama_awq": _awq,
    "gptoss_mxfp4": _gptoss,
}
