"""Weight formats as data: what the codes and scales of a 2-D weight look like, before any kernel is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix [rows, cols] of weights is stored as codes and scales.

    `block_rows` x `block_cols` elements share one scale; 0 means the whole extent of that dimension.
    A code takes `code_bits` bits; codes of fewer than eight are packed into bytes, the first in the lowest bits.
    `pads_cols` says that the codes of an incomplete last block are stored too (as zeros). `scale_words` is how many
    numbers stand side by side in the scale tensor for each block: 1, a scale; 2, a scale and a zero point, and a weight
    is (code - zero point) * scale.
    """

    name: str
    code_dtype: torch.dtype
    scale_dtype: torch.dtype
    block_rows: int
    block_cols: int
    code_bits: int
    pads_cols: bool = False
    scale_words: int = 1

    def code_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the code tensor of a matrix whose true size is [rows, cols]."""
        padded = _ceil_div(cols, self.block_cols) * self.block_cols if self.pads_cols else cols
        return rows, _ceil_div(padded * self.code_bits, 8)

    def scale_columns(self, first: int, last: int, cols: int) -> slice:
        """Columns of the scale tensor that columns [first, last) of `cols` need; `first` begins a block."""
        size = self.block_cols or max(cols, 1)
        return slice(first // size * self.scale_words, _ceil_div(last, size) * self.scale_words)

    def code_column(self, col: int) -> int:
        """Where in a row of the code tensor the code of column `col` begins; `col` is a multiple of `packed`."""
        return col * self.code_bits // 8

    @property
    def packed(self) -> int:
        """Codes that are packed together into whole bytes: 2 of four bits, 4 of six, 1 of eight."""
        return 8 // math.gcd(8, self.code_bits)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the scale tensor of a matrix whose true size is [rows, cols]."""
        return (
            _ceil_div(rows, self.block_rows) if self.block_rows else 1,
            self.scale_words * (_ceil_div(cols, self.block_cols) if self.block_cols else 1),
        )

    @property
    def whole_rows(self) -> bool:
        """Whether rows can be quantized only whole, because maxima of their parts do not tell their scales."""
        return False

    @property
    def row_align(self) -> int | None:
        """Rows a one-pass piece must start at a multiple of; None: it must hold every row."""
        return self.block_rows or None

    @property
    def col_align(self) -> int | None:
        """Columns a one-pass piece must start at a multiple of; None: it must hold every column."""
        return self.block_cols or None

    def bytes(self, rows: int, cols: int) -> int:
        """Bytes of codes and scales together of a matrix [rows, cols]."""
        code_rows, code_cols = self.code_shape(rows, cols)
        scale_rows, scale_cols = self.scale_shape(rows, cols)
        return code_rows * code_cols * self.code_dtype.itemsize + scale_rows * scale_cols * self.scale_dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class RowMultiplied(WeightFormat):
    """A format of blocks along K whose rows have a float32 multiplier beside: weight = multiplier * what `blocks` says.

    Codes are those of `blocks`. A row of the scale tensor is one of `blocks` and then, byte by byte in little-endian
    order, the multiplier; so every view of whole rows has what belongs to them.
    """

    blocks: WeightFormat

    def code_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """As in `blocks`."""
        return self.blocks.code_shape(rows, cols)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """As in `blocks`, and the bytes of the multiplier."""
        scale_rows, scale_cols = self.blocks.scale_shape(rows, cols)
        return scale_rows, scale_cols + MULTIPLIER_BYTES

    def scale_columns(self, first: int, last: int, cols: int) -> slice:
        """All of them."""
        return slice(0, self.scale_shape(1, cols)[1])

    @property
    def whole_rows(self) -> bool:
        """The multiplier is that of the least squared error of a row."""
        return True


MULTIPLIER_BYTES = 4


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


MXFP4 = WeightFormat("mxfp4", torch.uint8, torch.uint8, 1, 32, 4, pads_cols=True)
MXFP6_E2M3 = WeightFormat("mxfp6_e2m3", torch.uint8, torch.uint8, 1, 32, 6, pads_cols=True)
MXFP6_E3M2 = WeightFormat("mxfp6_e3m2", torch.uint8, torch.uint8, 1, 32, 6, pads_cols=True)
MXFP8 = WeightFormat("mxfp8", torch.float8_e4m3fn, torch.uint8, 1, 32, 8, pads_cols=True)
MXFP4_ROWS = RowMultiplied("mxfp4_rows", torch.uint8, torch.uint8, 1, 0, 4, blocks=MXFP4)
FP8_CHANNEL = WeightFormat("fp8_channel", torch.float8_e4m3fn, torch.float32, 1, 0, 8)
FP8_TENSOR = WeightFormat("fp8_tensor", torch.float8_e4m3fn, torch.float32, 0, 0, 8)
FP8_BLOCK = WeightFormat("fp8_block", torch.float8_e4m3fn, torch.float32, 128, 128, 8)
NVFP4 = WeightFormat("nvfp4", torch.uint8, torch.float32, 1, 16, 4)
INT8_CHANNEL = WeightFormat("int8_channel", torch.int8, torch.float32, 1, 0, 8)
FP8_CHANNEL_FNUZ = WeightFormat("fp8_channel_fnuz", torch.float8_e4m3fnuz, torch.float32, 1, 0, 8)
FP8_TENSOR_FNUZ = WeightFormat("fp8_tensor_fnuz", torch.float8_e4m3fnuz, torch.float32, 0, 0, 8)
FP8_BLOCK_FNUZ = WeightFormat("fp8_block_fnuz", torch.float8_e4m3fnuz, torch.float32, 128, 128, 8)

GROUPS = (16, 32, 64, 128, 256, 0)
"""Columns that share a scale and a zero point in the integer formats; 0: the whole row."""

INTEGERS = tuple(
    WeightFormat(f"int{bits}_group{group}_{short}", torch.uint8, dtype, 1, group, bits, scale_words=2)
    for bits in (4, 8)
    for group in GROUPS
    for short, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32))
)
"""Unsigned codes with a scale and a zero point for each group of a row, side by side in one [rows, 2 * groups] tensor.

The scale is of the dtype that the name ends in, as checkpoints store it, and so is the zero point, a whole number that
each of them holds exactly. A symmetric format is one whose zero points are all 2^(bits - 1).
"""
INT4FP8_CHANNEL = WeightFormat("int4fp8_channel", torch.uint8, torch.float32, 1, 0, 4, scale_words=2)
"""Stored and read as `int4_group0_f32` is, but quantized symmetrically: the zero points are all 8."""

MX = (MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8)
"""The formats with one power of two per 32 elements along K."""

FNUZ: Mapping[str, str] = MappingProxyType(
    {fmt.name: f"{fmt.name}_fnuz" for fmt in (FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK)}
)
"""What an FP8 format is stored as where the matrix instructions take E4M3 FNUZ (gfx942), by its name."""

FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            *MX,
            MXFP4_ROWS,
            *(FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK, INT8_CHANNEL, INT4FP8_CHANNEL),
            *(FP8_CHANNEL_FNUZ, FP8_TENSOR_FNUZ, FP8_BLOCK_FNUZ),
            *INTEGERS,
            NVFP4,
        )
    }
)
"""Every format by its name."""
