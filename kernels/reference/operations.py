"""The plain torch kernels: every operation of every format on any device, in bounded chunks, in obvious arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from .. import statistics as st
from ..formats import Tensors, WeightFormat
from .arguments import check_finish, check_linear, check_observe, check_quantize

CHUNK_ELEMENTS = 1 << 20
"""Elements a chunk may hold: the temporaries of a chunk stay under about 64 MiB."""
IN_CACHE = 1 << 17
"""Elements of a chunk that is worked on in many threads at once, with temporaries in each of them."""


class Codec(Protocol):
    """The arithmetic of one format; `values` are float32 [r, c], `scales` come expanded to [r, c] or [r, c/32]."""

    @property
    def format(self) -> WeightFormat: ...
    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor: ...
    @property
    def largest(self) -> float: ...
    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor: ...
    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor: ...
    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Reference:
    """All operations of one codec (see `registry` for what each takes and returns)."""

    codec: Codec

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        check_quantize(self.codec.format, out, tensors)
        rows, cols = out.shape
        for start, stop in row_chunks(rows, cols, IN_CACHE):
            expanded = self.expand(tensors[1:], start, stop, cols)
            out[start:stop].copy_(self.codec.decode(tensors[0][start:stop], expanded, cols))

    def linear(self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, n_rows: int, k: int) -> torch.Tensor:
        check_linear(self.codec.format, x, tensors, bias, n_rows, k)
        out = x.new_empty(x.shape[0], n_rows)
        step = tile_rows(self.codec.format, n_rows, k)
        tile = x.new_empty(min(step, n_rows), k)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            weight = tile[: stop - start]
            self.dequantize(tensor_rows(self.codec.format, tensors, start, stop), weight)
            out[:, start:stop] = times_tile(x, weight, None if bias is None else bias[start:stop])
        return out

    def expand(self, scales: Tensors, start: int, stop: int, cols: int) -> torch.Tensor:
        """Scales of rows [start, stop), one per element; per block of columns where the codec wants it so (MX).

        `scales` are the tensors beside the codes: a format that has several says here what they are together.
        """
        fmt, (scale,) = self.codec.format, scales
        rows = torch.arange(start, stop, device=scale.device)
        picked = scale[rows // fmt.block_rows if fmt.block_rows else torch.zeros_like(rows)]
        if fmt.pads_cols or not fmt.block_cols:
            return picked
        return picked.repeat_interleave(fmt.block_cols, 1)[:, :cols]

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        codec, (codes, *scales) = self.codec, tensors
        check_quantize(codec.format, source, tensors)
        if not scales_known and (nonfinite := self.make_scales(source, tuple(scales))):
            return nonfinite
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            values = source[start:stop].float()
            bad = int((~torch.isfinite(values)).sum())
            nonfinite += bad
            if bad:
                continue
            expanded = self.expand(tuple(scales), start, stop, source.shape[1])
            ratio = codec.ratio(values, expanded)
            encoded = codec.encode(ratio, expanded)
            codes[start:stop].copy_(encoded)
            if statistics is not None:
                self._measure(values, ratio, encoded, expanded, statistics)
        return nonfinite

    def make_scales(self, source: torch.Tensor, scales: Tensors) -> int:
        """Write the scales of whole blocks; the number of NaN and infinite elements, or 0 to leave them to be found."""
        shape = self.codec.format.amax_shape(*source.shape)
        amax = torch.zeros(shape, dtype=torch.float32, device=source.device)
        nonfinite = self.observe(source, amax)
        if not nonfinite:
            self.finish_scales(amax, scales)
        return nonfinite

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        fmt = self.codec.format
        check_observe(fmt, source, amax)
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            magnitude = source[start:stop].float().abs()
            nonfinite += int((~torch.isfinite(magnitude)).sum())
            first = start // fmt.block_rows if fmt.block_rows else 0
            for r0, r1, row in _bands(start, stop, fmt.block_rows, first):
                band = magnitude[r0 - start : r1 - start]
                if fmt.block_rows == 1:
                    amax[r0:r1].copy_(torch.maximum(amax[r0:r1], column_amax(band, fmt.block_cols)))
                else:
                    amax[row].copy_(torch.maximum(amax[row], column_amax(band, fmt.block_cols).amax(0)))
        amax.clamp_(max=fmt.largest_amax(source.dtype))  # here, where it is known which dtype must hold the values
        return nonfinite

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        check_finish(self.codec.format, amax, scales)
        (scale,) = scales
        scale.copy_(self.codec.scales_from_amax(amax.clamp(max=self.codec.format.largest_amax(amax.dtype))))

    def saturated(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Which elements lie beyond what codes can express, by more than the rounding of the scale."""
        return ratio.abs() > self.codec.largest * (1.0 + st.SATURATION_SLACK)

    def _measure(
        self,
        values: torch.Tensor,
        ratio: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        statistics: torch.Tensor,
    ) -> None:
        decoded = self.codec.decode(codes, scales, values.shape[1])
        x, error = values.double(), (values - decoded).double()
        part = torch.zeros_like(statistics)
        part[st.COUNT] = values.numel()
        part[st.SIGNAL] = x.square().sum()
        part[st.NOISE] = error.square().sum()
        part[st.MAX_ERROR] = error.abs().max() if error.numel() else 0.0
        part[st.AMAX] = x.abs().max() if x.numel() else 0.0
        part[st.SATURATED] = self.saturated(ratio, scales).sum()
        part[st.ZERO] = (decoded == 0).sum()
        st.merge(statistics, part)


def times_tile(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, k] times the transposed tile [n, k] of the same type, plus bias [n]; one of another type in float32."""
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x, weight).float() + bias


def tile_rows(fmt: WeightFormat, n_rows: int, k: int) -> int:
    """Rows of a dequantized tile: about 4 MiB of 16-bit values, whole scale blocks, at least one block.

    Larger than the caches next to a core, as what a matmul costs beside its arithmetic is paid once a tile.
    """
    rows = max(1, (1 << 21) // max(k, 1))
    step = max(fmt.block_rows, 32)
    return max(step, min(rows // step * step, 2048))


def tensor_rows(fmt: WeightFormat, tensors: Tensors, start: int, stop: int) -> Tensors:
    """What belongs to rows [start, stop) of a weight; start is a multiple of the format's block_rows."""
    return tuple(tensor[slice(*wanted.rows(start, stop))] for wanted, tensor in zip(fmt.tensors, tensors, strict=True))


def as_one_row(fmt: WeightFormat, source: torch.Tensor, *others: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of `source`, as one row where nothing but whole blocks lies between the first and the last."""
    rows, cols = source.shape
    dense = all(tensor.stride(0) == tensor.shape[1] for tensor in (source, *others))
    in_row = fmt.block_rows == 1 and fmt.block_cols and cols % fmt.block_cols == 0
    return (1, rows * cols) if dense and in_row and rows * cols < 1 << 31 else (rows, cols)


def row_chunks(rows: int, cols: int, elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Rows, first and behind the last, of chunks of at most so many elements, at least one row."""
    step = max(1, elements // max(cols, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _bands(start: int, stop: int, block_rows: int, row: int) -> Iterator[tuple[int, int, int]]:
    """Parts of [start, stop) whose rows share one row of scales; all of it where every row has its own."""
    if block_rows <= 1:
        yield start, stop, row
        return
    while start < stop:
        end = min(stop, (row + 1) * block_rows)
        yield start, end, row
        start, row = end, row + 1


def column_amax(magnitude: torch.Tensor, block_cols: int) -> torch.Tensor:
    """Largest value of every row and column block: [r, ceil(c / block_cols)]."""
    rows, cols = magnitude.shape
    width = block_cols or max(cols, 1)
    padded = F.pad(magnitude, (0, -cols % width))
    return padded.view(rows, -1, width).amax(2) if padded.numel() else magnitude.new_zeros(rows, 1)
