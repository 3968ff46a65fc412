"""MXFP4 on gfx950 (MI350X, MI355X) through AMD's aiter: W4A4 linear layers, fused experts, and the layouts they want.

aiter comes from github.com/ROCm/aiter. The package of that name on PyPI is an unrelated one for asyncio, so nothing is
imported before ROCm, the GPU and the files of the package have been looked at. None of this has run on a real MI350X:
the tests check the calls against a stand-in, and the layouts against aiter's own output.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..arrangement import Arrangement
from ..formats import MXFP4, Tensors, WeightFormat
from ..reference.arguments import check_linear
from .target import GpuTarget

WHERE = "get it from github.com/ROCm/aiter"
MARKS = ("ops", "fused_moe")
"""Submodules that AMD's package has and the other has not."""
ALIGN = 256
"""Rows, and columns, of a weight come in whole multiples of this: those of `e8m0_shuffle` for rows, 8 scales of 32."""
CHUNK_ROWS = 4096


class NotUsable(Exception):
    """aiter cannot be used here; the message says why."""


@dataclass(frozen=True)
class Aiter:
    """What is used of AMD's aiter."""

    dynamic_mxfp4_quant: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gemm_a4w4: Callable[..., torch.Tensor]
    fused_moe: Callable[..., torch.Tensor]
    shuffle_weight: Callable[..., torch.Tensor]
    e8m0_shuffle: Callable[[torch.Tensor], torch.Tensor]
    code_type: torch.dtype
    scale_type: torch.dtype
    silu: Any
    per_1x32: Any


def lacks(fmt: WeightFormat, target: GpuTarget) -> str | None:
    """Why aiter's kernels are not for a GPU, installed or not."""
    return None if target.name == "gfx950" else f"aiter's MXFP4 kernels are for gfx950, this GPU is {target.name}"


def missing() -> str | None:
    """Why aiter cannot be used in this process, or None when it can; tries to import it."""
    try:
        load()
    except NotUsable as error:
        return str(error)
    return None


@cache
def load() -> Aiter:
    """AMD's aiter; `NotUsable` where this is no ROCm, it is not installed, or something else has its name."""
    if torch.version.hip is None:
        raise NotUsable("aiter is for ROCm, and this torch is not built for it")
    look_at_package()
    try:
        package = importlib.import_module("aiter")
        quant = importlib.import_module("aiter.ops.triton.quant")
        shuffle = importlib.import_module("aiter.ops.shuffle")
        fp4 = importlib.import_module("aiter.utility.fp4_utils")
        moe = importlib.import_module("aiter.fused_moe")
        return Aiter(
            dynamic_mxfp4_quant=quant.dynamic_mxfp4_quant,
            gemm_a4w4=package.gemm_a4w4,
            fused_moe=moe.fused_moe,
            shuffle_weight=shuffle.shuffle_weight,
            e8m0_shuffle=fp4.e8m0_shuffle,
            code_type=package.dtypes.fp4x2,
            scale_type=package.dtypes.fp8_e8m0,
            silu=package.ActivationType.Silu,
            per_1x32=package.QuantType.per_1x32,
        )
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise NotUsable(f"AMD's aiter does not import, or lacks what is needed: {error!r}; {WHERE}") from error


def look_at_package() -> None:
    """`NotUsable` unless the installed `aiter` is AMD's, told by its files, or its attributes if it is imported."""
    if "aiter" in sys.modules:
        if not hasattr(sys.modules["aiter"], "gemm_a4w4"):
            raise NotUsable(_stranger(getattr(sys.modules["aiter"], "__file__", None)))
        return
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        raise NotUsable(f"AMD's aiter is not installed; {WHERE}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for mark in MARKS:
        if not any((folder / mark).is_dir() or (folder / f"{mark}.py").is_file() for folder in folders):
            raise NotUsable(_stranger(spec.origin))


def _stranger(origin: str | None) -> str:
    return f"the installed aiter ({origin}) is not AMD's but the asyncio package of that name on PyPI; {WHERE}"


def arrange(tensors: Tensors) -> None:
    """Bring codes [N, K/2] and scales [N, K/32], or [E, ...] of both, into aiter's layouts, in place.

    N and K are multiples of `ALIGN`. A few thousand rows at a time: both layouts move bytes only within bands of 16
    and 32 rows.
    """
    aiter, (codes, scales) = load(), tensors
    for matrix, factors in zip(codes.view(-1, *codes.shape[-2:]), scales.view(-1, *scales.shape[-2:]), strict=True):
        for start in range(0, codes.shape[-2], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            matrix[rows] = aiter.shuffle_weight(matrix[rows].contiguous(), layout=(16, 16)).view(torch.uint8)
            factors[rows] = aiter.e8m0_shuffle(factors[rows].contiguous()).view(torch.uint8)


def canonical(tensors: Tensors) -> Tensors:
    """Canonical copies of what `arrange` has arranged."""
    codes, scales = tensors
    return unshuffle_codes(codes), unshuffle_scales(scales)


def unshuffle_codes(codes: torch.Tensor) -> torch.Tensor:
    """Undo `shuffle_weight(layout=(16, 16))` of bytes [..., N, B]: in it, 16 rows by 16 bytes lie in one piece.

    Of each 16 rows come 32 bytes at a time: their first 16, row after row, then their second.
    """
    *lead, n_rows, width = codes.shape
    tiles = codes.reshape(-1, n_rows // 16, width // 32, 2, 16, 16)
    return tiles.permute(0, 1, 4, 2, 3, 5).reshape(*lead, n_rows, width)


def unshuffle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Undo `e8m0_shuffle` of bytes [..., N, B] with N a multiple of 32 and B of 8.

    It cuts 32 rows by 8 columns into 2 x 16 by 2 x 4 and writes them with the order column in 4, row in 16, column
    half, row half, the last one fastest.
    """
    *lead, n_rows, width = scales.shape
    tiles = scales.reshape(-1, n_rows // 32, width // 8, 4, 16, 2, 2)
    return tiles.permute(0, 1, 6, 4, 2, 5, 3).reshape(*lead, n_rows, width)


@dataclass(frozen=True)
class AiterLinear:
    """`linear` on weights that `arrange` has seen, activations in MXFP4 too; results pass through BF16."""

    format: WeightFormat = MXFP4

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        rows, wide = padded(n_rows), _widened(x)
        check_linear(self.format, wide, tensors, None, rows, padded(k))
        codes, scales = tensors
        if bias is not None and bias.shape != (n_rows,):
            raise ValueError(f"{self.format.name}: bias must have shape [{n_rows}], got {list(bias.shape)}")
        if not x.shape[0]:
            return x.new_empty(0, n_rows)
        aiter = load()
        x_codes, x_scales = aiter.dynamic_mxfp4_quant(wide.contiguous())
        operands = (
            x_codes.view(aiter.code_type),
            codes.view(aiter.code_type),
            aiter.e8m0_shuffle(x_scales.contiguous()).view(aiter.scale_type),
            scales.view(aiter.scale_type),
        )
        out = _gemm(aiter.gemm_a4w4, operands, x.shape[0], rows)[:, :n_rows]
        return (out if bias is None else out.float() + bias).to(x.dtype).contiguous()


def _widened(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] with columns of zeros where the weight has them."""
    missing = padded(x.shape[1]) - x.shape[1]
    return F.pad(x, (0, missing)) if missing else x


def padded(size: int) -> int:
    """`size` rounded up to a multiple of `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


def _gemm(
    gemm_a4w4: Callable[..., torch.Tensor], operands: tuple[torch.Tensor, ...], tokens: int, n_rows: int
) -> torch.Tensor:
    """BF16 [T, N]; up to 2025 the function filled a tensor of whole 32 rows, since then it makes its own."""
    if "out" not in inspect.signature(gemm_a4w4).parameters:
        return gemm_a4w4(*operands, dtype=torch.bfloat16, bpreshuffle=True)[:tokens]
    out = torch.empty(-(-tokens // 32) * 32, n_rows, dtype=torch.bfloat16, device=operands[0].device)
    gemm_a4w4(*operands, out, bpreshuffle=True)
    return out[:tokens]


def fused_moe(
    x: torch.Tensor,
    gate_up: Tensors,
    down: Tensors,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """All of a SwiGLU experts layer: x [T, H], codes and scales of [E, 2I, H] (gate rows first) and [E, H, I]; [T, H].

    The weights were arranged, and both sizes in them are padded to multiples of 256, gate and up each for itself.
    Routing [T, k] has ids below E only.
    """
    aiter = load()
    wide = _widened(x)
    codes = [weight.view(aiter.code_type) for weight, _ in (gate_up, down)]
    for weight in codes:
        weight.is_shuffled = True  # type: ignore[attr-defined]  # how aiter's own shuffle_weight tells its fused_moe
    out = aiter.fused_moe(
        wide if x.dtype in (torch.bfloat16, torch.float16) else wide.bfloat16(),
        *codes,
        top_k_weights.float(),
        top_k_index.int(),
        quant_type=aiter.per_1x32,
        activation=aiter.silu,
        w1_scale=gate_up[1].view(aiter.scale_type),
        w2_scale=down[1].view(aiter.scale_type),
        doweight_stage1=False,
    )
    return out[:, : x.shape[1]].to(x.dtype).contiguous()


ARRANGEMENT = Arrangement((ALIGN, ALIGN), arrange, canonical, fused_moe)
"""What aiter's kernels want of a weight."""
