"""Copies of ordinary checkpoints whose matrices are quantized, each with a copy that holds what they stand for.

Written with torch alone: 2-D weights become codes and scales under the names a tool would give them, and the same
weights, dequantized to float32, make the checkpoint to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import raw_checkpoint
import torch
from stored_values import AWQ_ORDER
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
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-4).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    spread, zeros = scale.float().repeat_interleave(group, 1), zero.repeat_interleave(group, 1)
    codes = ((weight / spread).round() + zeros).clamp(0, 15)
    parts = {"qweight": _packed(codes.T), "qzeros": _packed(zero.T), "scales": scale.T.contiguous()}
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, (codes - zeros) * spread


def _packed(codes: Tensor) -> Tensor:
    """Eight codes an int32, in AWQ's order."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(AWQ_ORDER):
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


METHODS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "fp8 rows": (fp8_rows, compressed_tensors("channel")),
    "fp8 tensors": (fp8_tensors, compressed_tensors("tensor")),
    "fp8 blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
}
