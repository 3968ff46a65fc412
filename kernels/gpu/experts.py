"""Fused experts on quantized weights through Triton: every expert's tokens in one launch, without asking the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ..formats import Tensors, WeightFormat
from ..reference.arguments import check_experts
from .jit.matmul import multiply_experts
from .linear import Operands, check_rows, constants, in_kernels, on_device, operands, target_of
from .target import GpuTarget
from .tiles import Tiles
from .ways import WAYS


@dataclass(frozen=True)
class TritonExperts:
    """`experts` of one format (see `registry`), in a way of `WAYS`.

    `target` is that of the device of x unless given.
    """

    format: WeightFormat
    way: str
    target: GpuTarget | None = None

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        offsets: torch.Tensor,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        check_experts(self.format, x, tensors, bias, offsets, n_rows, k)
        codes = tensors[0]
        check_rows(self.format, tensors[0], tensors[1], bias)
        out = x.new_empty(x.shape[0], n_rows)
        if not out.numel():
            return out
        target = self.target or target_of(x)
        per_expert = -(-x.shape[0] // max(codes.shape[0], 1))
        way = WAYS[self.way]
        tiles = way.tiles(self.format, target, per_expert, k, x.dtype.itemsize)
        with on_device(x):
            given = operands(self.format, way, target, x)
            self._launch(given, tensors, bias, offsets, out, k, tiles)
        return out

    def _launch(
        self,
        given: Operands,
        tensors: Tensors,
        bias: torch.Tensor | None,
        offsets: torch.Tensor,
        out: torch.Tensor,
        k: int,
        tiles: Tiles,
    ) -> None:
        tokens, n_rows = out.shape
        experts = tensors[0].shape[0]
        bits, scales, scale_2 = in_kernels(self.format, tensors)
        multiply_experts[(most_blocks(tokens, experts, tiles.tokens), triton.cdiv(n_rows, tiles.rows))](
            given.x,
            given.scales,
            given.scale_2,
            bits,
            scales,
            scale_2,
            out if bias is None else bias,
            out,
            offsets,
            experts,
            tokens,
            n_rows,
            k,
            given.x.stride(0),
            given.scale_stride,
            bits.stride(1),
            bits.stride(0),
            scales.stride(1) if self.format.block_rows else 0,
            scales.stride(0),
            0 if bias is None else bias.stride(0),
            n_rows,
            **given.constants,
            **constants(tiles, k),
            HAS_BIAS=bias is not None,
            EXPERTS=triton.next_power_of_2(experts + 1),
        )


def most_blocks(tokens: int, experts: int, block: int) -> int:
    """Blocks of tokens there can be at most, each of one expert or of nobody, however the tokens are routed."""
    return min(tokens, tokens // block + experts + 1)
