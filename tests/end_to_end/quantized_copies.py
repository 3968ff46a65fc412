"""Copies of ordinary checkpoints whose matrices are quantized, each with a copy that holds what they stand for.

Written with torch alone: 2-D weights become codes and scales under the names a tool would give them, and the same
weights, dequantized to float32, make the checkpoint to compare with.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import raw_checkpoint
import torch
from stored_values import AWQ_ORDER, E2M1
from torch import Tensor

NOT_LINEAR = re.compile(
    r"embed|wte|wpe|lm_head|\bshared\b|norm|router|\bgate\.weight|classifier|conv|pooler|patch|position"
)

Stored = dict[str, Tensor]
Quantize = Callable[[str, Tensor], tuple[Stored, Tensor]]


def quantized_copy(folder: Path, original: Path, quantize: Quantize, config: dict[str, Any]) -> tuple[Path, Path]:
    """The quantized copy of a checkpoint, and the one that holds what its codes stand for."""
    stored: Stored = {}
    plain: Stored = {}
    for name, tensor in raw_checkpoint.read(original).items():
        if tensor.dim() != 2 or not tensor.numel() or not name.endswith(".weight") or NOT_LINEAR.search(name):
            stored[name] = plain[name] = tensor
            continue
        parts, values = quantize(name.removesuffix(".weight"), tensor.float())
        stored.update(parts)
        plain[name] = values
    quantized = raw_checkpoint.write(folder / "quantized", original, [stored])
    described = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return quantized, raw_checkpoint.write(folder / "plain", original, [plain])


def fp8_rows(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """E4M3 with one BF16 scale a row, as compressed-tensors stores it."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).clamp(min=1e-6).bfloat16()
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}, codes.float() * scale.float()


def fp8_tensors(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """E4M3 with one scale for the whole tensor."""
    scale = (weight.abs().amax() / 448).clamp(min=1e-6)
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale.reshape(1)}, codes.float() * scale


def fp8_blocks(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """E4M3 with one float32 scale a block of 128 x 128, the last ones smaller, as DeepSeek stores it."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-6)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}, codes.float() * spread


def awq(module: str, weight: Tensor, group: int = 16) -> tuple[Stored, Tensor]:
    """INT4 with float16 scales and zero points for groups of 16 along K, as AutoAWQ's GEMM stores it."""
    codes, zero, scale, values = _int4(weight, group)
    parts = {"qweight": _packed(codes.T), "qzeros": _packed(zero.T), "scales": scale.T.contiguous()}
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, values


def gptq(module: str, weight: Tensor, group: int = 16) -> tuple[Stored, Tensor]:
    """INT4 with float16 scales and zero points for groups along K, as GPTQModel stores it."""
    codes, zero, scale, values = _int4(weight, group)
    columns, ones = torch.arange(weight.shape[1], dtype=torch.int32), 0x11111111
    parts = {"qweight": _packed(codes, range(8)).T.contiguous(), "qzeros": _packed(zero.T, range(8)) - ones}
    parts |= {"scales": scale.T.contiguous(), "g_idx": columns // group}
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, values


def nvfp4(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """E2M1 with one E4M3 scale for 16 along K, and a float32 one for the tensor, as ModelOpt stores it."""
    values = torch.tensor(E2M1)
    grouped = weight.unflatten(1, (-1, 16))
    overall = (weight.abs().amax() / (6 * 448)).clamp(min=1e-6)
    scale = (grouped.abs().amax(2) / 6 / overall).to(torch.float8_e4m3fn)
    spread = (scale.float() * overall).unsqueeze(2)
    nearest = ((grouped / spread.clamp(min=1e-12)).abs().unsqueeze(-1) - values).abs().argmin(-1)
    sign = torch.signbit(grouped)
    codes = (nearest + 8 * sign).flatten(1).to(torch.uint8)
    parts = {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": overall,
        "input_scale": torch.tensor(0.01),
    }  # fmt: skip
    stands_for = torch.where(sign, -values[nearest], values[nearest]) * spread
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, stands_for.flatten(1)


def mxfp8(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """E4M3 with one power of two for 32 along K, as compressed-tensors stores it."""
    grouped = weight.unflatten(1, (-1, 32))
    exponent = torch.ceil(torch.log2((grouped.abs().amax(2) / 448).clamp(min=2.0**-126)))
    spread = torch.exp2(exponent).unsqueeze(2)
    codes = (grouped / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {"weight": codes.flatten(1), "weight_scale": (exponent + 127).to(torch.uint8)}
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, (codes.float() * spread).flatten(1)


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points and float16 scales [N, K / group], and the values; the last group may not be full."""
    columns = weight.shape[1]
    grouped = torch.nn.functional.pad(weight, (0, -columns % group)).unflatten(1, (-1, group))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-4).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    spread, zeros = (each.float().repeat_interleave(group, 1)[:, :columns] for each in (scale, zero))
    codes = ((weight / spread).round() + zeros).clamp(0, 15)
    return codes, zero, scale, (codes - zeros) * spread


def _packed(codes: Tensor, order: Sequence[int] = AWQ_ORDER) -> Tensor:
    """Eight codes an int32, in AWQ's order."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(order):
        words |= codes[:, column::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def compressed_tensors(strategy: str) -> dict[str, Any]:
    """The config of FP8 weights."""
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "format": "float-quantized"}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


MXFP8: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "mxfp8-quantized", "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "format": "mxfp8-quantized",
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                "dynamic": False, "scale_dtype": "torch.uint8",
            },
        }
    },
    "ignore": ["lm_head"],
}  # fmt: skip

METHODS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "fp8 rows": (fp8_rows, compressed_tensors("channel")),
    "fp8 tensors": (fp8_tensors, compressed_tensors("tensor")),
    "fp8 blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
    ),
    "nvfp4": (
        nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    ),
    "mxfp8": (mxfp8, MXFP8),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}),
    "gptq 64": (
        functools.partial(gptq, group=64),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False},
    ),
}
