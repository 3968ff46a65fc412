"""Linear layers on quantized weights through Triton: launches `jit/matmul.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..formats import Tensors, WeightFormat
from ..reference.arguments import check_linear
from .jit.matmul import multiply_linear
from .jit.tile_matmul import sum_parts
from .target import GpuTarget, gpu_target
from .tiles import Tiles, split_of_k
from .ways import WAYS, Way


@dataclass(frozen=True)
class Operands:
    """Activations as a kernel takes them, and the constants that say so."""

    x: torch.Tensor
    scales: torch.Tensor
    scale_2: torch.Tensor
    scale_stride: int
    constants: dict[str, Any]


@dataclass(frozen=True)
class TritonLinear:
    """`linear` of one format (see `registry`), in a way of `WAYS`.

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
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        check_linear(self.format, x, tensors, bias, n_rows, k)
        check_rows(self.format, tensors[0], tensors[1], bias)
        out = x.new_empty(x.shape[0], n_rows)
        if not out.numel():
            return out
        target = self.target or target_of(x)
        way = WAYS[self.way]
        tiles = way.tiles(self.format, target, x.shape[0], k, x.dtype.itemsize)
        with on_device(x):
            given = operands(self.format, way, target, x)
            self._launch(given, tensors, bias, out, k, tiles, target)
        return out

    def _launch(
        self,
        given: Operands,
        tensors: Tensors,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        k: int,
        tiles: Tiles,
        target: GpuTarget,
    ) -> None:
        tokens, n_rows = out.shape
        tiles_t, tiles_n = triton.cdiv(tokens, tiles.tokens), triton.cdiv(n_rows, tiles.rows)
        step = split_of_k(target, tiles_t * tiles_n, tiles, tokens, k)
        parts = max(1, triton.cdiv(k, step))
        written = out if parts == 1 else torch.empty(parts, tokens, n_rows, dtype=torch.float32, device=out.device)
        bits, scales, scale_2 = in_kernels(self.format, tensors)
        multiply_linear[(tiles_t, tiles_n, parts)](
            given.x,
            given.scales,
            given.scale_2,
            bits,
            scales,
            scale_2,
            out if bias is None else bias,
            written,
            tokens,
            n_rows,
            k,
            step,
            given.x.stride(0),
            given.scale_stride,
            bits.stride(0),
            scales.stride(0) if self.format.block_rows else 0,
            n_rows,
            **given.constants,
            **constants(tiles, k),
            HAS_BIAS=bias is not None and parts == 1,
        )
        if parts > 1:
            grid = (triton.cdiv(out.numel(), 1024),)
            has_bias, given_bias = bias is not None, out if bias is None else bias
            sum_parts[grid](written, out, given_bias, out.numel(), n_rows, PARTS=parts, HAS_BIAS=has_bias, BLOCK=1024)


def operands(fmt: WeightFormat, way: Way, target: GpuTarget, x: torch.Tensor) -> Operands:
    """Activations x [T, k] for the kernels of a format: as they are, or quantized in a launch of their own."""
    x = x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
    kinds = way.constants(fmt, target, x.dtype, x.shape[0])
    if way.quantize is None or kinds["ACTIVATIONS"] != "codes":
        return Operands(x, x, x, 0, kinds)
    codes, scales, *outer = way.quantize(x, fmt)
    stride = scales.stride(0) if fmt.block_rows else 0
    return Operands(code_bits(fmt, codes), scales, outer[0] if outer else scales, stride, kinds)


def constants(tiles: Tiles, k: int) -> dict[str, Any]:
    """What the tile sizes mean to a kernel and its launch."""
    return {
        "EVEN_K": tiles.even(k),
        "BT": tiles.tokens,
        "BN": tiles.rows,
        "BK": tiles.columns,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def code_bits(fmt: WeightFormat, codes: torch.Tensor) -> torch.Tensor:
    """Codes as integers that every GPU loads: FP8 as bytes; FP6 as words, of which three hold sixteen codes."""
    if fmt.code_bits == 6:
        return codes.view(torch.int32)
    return codes.view(torch.uint8) if codes.dtype.is_floating_point else codes


def in_kernels(fmt: WeightFormat, tensors: Tensors) -> Tensors:
    """Codes, scales and those of the whole tensor or, without gaps, its rows (else scales), as every GPU loads them."""
    codes, scales, *outer = tensors
    if not outer:
        return code_bits(fmt, codes), scales, scales
    return code_bits(fmt, codes), code_bits(fmt, scales), outer[0].contiguous()


def check_rows(fmt: WeightFormat, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless each row of codes, scales and bias lies in one piece, and of FP6 at whole words."""
    for name, tensor in (("codes", codes), ("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{fmt.name}: rows of {name} must be contiguous, got strides {tensor.stride()}")
    places = (codes.storage_offset(), *codes.stride()[:-1])
    if fmt.code_bits == 6 and any(place % 4 for place in places):
        raise ValueError(
            f"{fmt.name}: rows of codes must start at multiples of 4 bytes, got strides {codes.stride()} from byte "
            f"{codes.storage_offset()} on; copy them into a tensor of their own"
        )


def target_of(x: torch.Tensor) -> GpuTarget:
    """The GPU that holds x; ValueError if none does."""
    target = gpu_target(x.device)
    if target is None:
        raise ValueError(f"a GPU kernel was given a tensor on {x.device}; move the whole layer, or its input, to a GPU")
    return target


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Launch on the GPU that holds x, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
