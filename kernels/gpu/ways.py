"""How weights meet activations: which tile of `jit.matmul` multiplies them, of what sizes, and what is quantized first.

The rows of `matmuls` name a way for the formats that each serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ..formats import Tensors, WeightFormat
from .activations import quantize_mx_activations, quantize_nvfp4_activations, quantize_scaled_activations
from .target import GpuTarget
from .tiles import FEW_TOKENS, Tiles, decoded_tiles, mx_tiles, scaled_tiles


@dataclass(frozen=True)
class Way:
    """A way of multiplying.

    `kinds` makes TILE and ACTIVATIONS of a GPU, the type of the activations and their number; `tiles` makes the sizes
    of tiles, for activations [tokens, k] of so many bytes each. `quantize` makes what "codes" for ACTIVATIONS stands
    for: codes, scales and, where the format has one, the scale of each token.
    """

    kinds: Callable[[GpuTarget, torch.dtype, int], tuple[str, str]]
    tiles: Callable[[WeightFormat, GpuTarget, int, int, int], Tiles]
    quantize: Callable[[torch.Tensor, WeightFormat], Tensors] | None = None

    def constants(self, fmt: WeightFormat, target: GpuTarget, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
        """What the kernels of `jit.matmul` are compiled for, beside the sizes of tiles."""
        tile, activations = self.kinds(target, dtype, tokens)
        return {
            "TILE": tile,
            "CODE": fmt.element,
            "SCALE": fmt.scale_element,
            "GROUP": fmt.block_cols,
            "ACTIVATIONS": activations,
            "SCALE_2": "" if len(fmt.scales) == 1 else "row" if fmt.scales[1].block_rows else "tensor",
        }


def _always(tile: str, activations: str) -> Callable[[GpuTarget, torch.dtype, int], tuple[str, str]]:
    return lambda target, dtype, tokens: (tile, activations)


def _as_triton_decodes(target: GpuTarget, dtype: torch.dtype, tokens: int) -> tuple[str, str]:
    """Triton decodes E2M1 to FP16 only where there is FP8 (sm_89), and never to FP32."""
    if dtype == torch.bfloat16:
        return "mx", "bf16"
    able = dtype == torch.float16 and (target.is_amd or target.capability >= 89)
    return ("mx", "fp16") if able else ("decoded", "decode")


def _in_registers_if_few(target: GpuTarget, dtype: torch.dtype, tokens: int) -> tuple[str, str]:
    return "mx", "quantize" if tokens <= FEW_TOKENS else "codes"


def _mx_sizes(quantized: bool) -> Callable[[WeightFormat, GpuTarget, int, int, int], Tiles]:
    return lambda fmt, target, tokens, k, itemsize: mx_tiles(target, tokens, k, quantized, itemsize)


def _decoded_sizes(fmt: WeightFormat, target: GpuTarget, tokens: int, k: int, itemsize: int) -> Tiles:
    return decoded_tiles(target, tokens, k, itemsize)


def _scaled_sizes(quantized: bool) -> Callable[[WeightFormat, GpuTarget, int, int, int], Tiles]:
    return lambda fmt, target, tokens, k, itemsize: scaled_tiles(
        target, tokens, k, quantized, itemsize, fmt.block_rows > 1
    )


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "decoded": Way(_always("decoded", "decode"), _decoded_sizes),
        "mx": Way(_as_triton_decodes, _mx_sizes(False)),
        "mx codes": Way(_in_registers_if_few, _mx_sizes(True), quantize_mx_activations),
        "nvfp4 codes": Way(_always("nvfp4", "codes"), _mx_sizes(True), quantize_nvfp4_activations),
        "scaled": Way(_always("scaled", "float"), _scaled_sizes(False)),
        "scaled codes": Way(_always("scaled", "codes"), _scaled_sizes(True), quantize_scaled_activations),
    }
)
"""Each by its name; activations stay as they are, or become codes as well."""
