"""Launches the Triton kernels that make and read codes: quantize, observe, finish_scales, dequantize.

One launch a piece, and a second, of seven programs, where statistics are wanted. Nothing waits for the device except
reading the count of non-finite elements at the end of `quantize` and `observe`; `enqueue_quantize` and
`enqueue_observe` leave it there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import statistics as st
from .formats import FNUZ, FORMATS, MX, WeightFormat
from .jit import measure, mx, scaled
from .mx import ELEMENTS
from .reference import check_finish, check_quantize, check_scales

TILE = 4096
"""Elements that a program of four warps makes: 32 for each thread of NVIDIA's, 16 of AMD's."""
ROW_TILE = 2048
"""Elements of rows that a program works on at a time, where it makes whole rows."""
WIDEST = 1024
"""Most columns of a tile of several rows."""
MERGE = 1024
SCALES = 256
PARTIALS = 6
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""No operation of these kernels may be fused with another: each is rounded as in plain torch."""

_OCP = {fnuz: name for name, fnuz in FNUZ.items()}
_RULES = {"int8_channel": "int8"}


@dataclass(frozen=True)
class TritonQuantize:
    """The operations of one format that have no matmul in them (see `registry` for what each takes and returns)."""

    format: WeightFormat

    def quantize(
        self,
        source: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=source.device)
        measured = statistics
        if statistics is not None and statistics.device != source.device:
            measured = st.new_statistics(source.device)
        self.enqueue_quantize(source, codes, scales, nonfinite, measured, scales_known)
        count = int(nonfinite)
        if statistics is not None and measured is not None and measured is not statistics:
            st.merge(statistics, measured.to(statistics.device))
        return count

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=source.device)
        self.enqueue_observe(source, amax, nonfinite)
        return int(nonfinite)

    def enqueue_quantize(
        self,
        source: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        nonfinite: torch.Tensor,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> None:
        """`quantize` on the current stream, without waiting: int64 `nonfinite` [1] is raised by what it would return.

        Everything is on one device, the float64 [STATS] `statistics` too.
        """
        check_quantize(self.format, source, codes, scales)
        if not source.numel():
            return
        with _on(source.device):
            if not scales_known and not self.format.block_rows:
                scales_known = True
                amax = torch.zeros(scales.shape, dtype=torch.float32, device=source.device)
                self.enqueue_observe(source, amax, nonfinite)
                self.finish_scales(amax, scales)
                counted = torch.zeros_like(nonfinite)  # those of the first pass are not counted twice
            else:
                counted = nonfinite
            launch = _quantize_mx if self.format in MX else _quantize_scaled
            partials = launch(self.format, source, codes, scales, counted, statistics is not None, scales_known)
            if statistics is not None:
                measure.merge_partials[(st.STATS,)](
                    partials, statistics, partials.shape[1], source.numel(), BLOCK=MERGE, num_warps=4, **EXACT
                )

    def enqueue_observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        """`observe` on the current stream, without waiting: int64 `nonfinite` [1] is raised by what it would return."""
        check_scales(self.format, source, amax, torch.float32)
        if not source.numel():
            return
        rows, cols = source.shape
        strides = (source.stride(0), amax.stride(0))
        with _on(source.device):
            if self.format in MX:
                tile = _block_tile(rows, cols)
                mx.observe_mx[_grid(rows, cols, tile["R"], 32 * tile["B"])](
                    _bits(source), amax.view(torch.int32), nonfinite, rows, cols, *strides, **tile, num_warps=4, **EXACT
                )
                return
            tile, warps = _scaled_tile(self.format, cols)
            scaled.observe_scaled[_grid(rows, cols, tile["R"], tile["C"])](
                _bits(source), amax.view(torch.int32), nonfinite, rows, cols, *strides,
                GROUP=_group(self.format), **tile, num_warps=warps, **EXACT,
            )  # fmt: skip

    def finish_scales(self, amax: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        check_finish(self.format, amax, out)
        target = amax if out is None else out
        if not amax.numel():
            return target
        flat = amax.view(-1, amax.shape[-1]), target.view(-1, target.shape[-1])
        rows, cols = flat[0].shape
        sizes = (rows, cols, flat[0].stride(0), flat[1].stride(0))
        grid = (-(-amax.numel() // SCALES),)
        with _on(amax.device):
            if self.format in MX:
                element = ELEMENTS[self.format.name]
                mx.scales_mx[grid](
                    flat[0].view(torch.int32), flat[1], *sizes,
                    EMAX=element.emax, THRESHOLD=element.threshold, N=SCALES, num_warps=4, **EXACT,
                )  # fmt: skip
            else:
                scaled.scales_scaled[grid](*flat, *sizes, **_rule(self.format), N=SCALES, num_warps=4, **EXACT)
        return target

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        fmt = self.format
        check_quantize(fmt, out, codes, scales)
        if not out.numel():
            return
        rows, cols = out.shape
        sizes = (rows, cols, codes.stride(0), scales.stride(0), out.stride(0))
        with _on(out.device):
            if fmt in MX:
                element, tile = ELEMENTS[fmt.name], _block_tile(rows, cols)
                mx.dequantize_mx[_grid(rows, cols, tile["R"], 32 * tile["B"])](
                    _bits(codes), scales, _bits(out), *sizes,
                    CODE_BITS=fmt.code_bits, MANTISSA=element.mantissa_bits, BIAS=element.bias,
                    NAN=0x7F if fmt.code_bits == 8 else -1, **tile, num_warps=4, **EXACT,
                )  # fmt: skip
                return
            tile, warps = _scaled_tile(fmt, cols)
            code = {torch.int8: "int8", torch.float8_e4m3fnuz: "fnuz"}.get(fmt.code_dtype, "e4m3")
            scaled.dequantize_scaled[_grid(rows, cols, tile["R"], tile["C"])](
                _bits(codes), scales, _bits(out), *sizes, GROUP=_group(fmt), CODE=code, **tile, num_warps=warps, **EXACT
            )


def triton_quantize(format_name: str) -> TritonQuantize:
    """The operations of a format."""
    return TritonQuantize(FORMATS[format_name])


def _quantize_mx(
    fmt: WeightFormat,
    source: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nonfinite: torch.Tensor,
    measured: bool,
    known: bool,
) -> torch.Tensor:
    """Launch, and return the partial statistics."""
    rows, cols = source.shape
    dense = all(t.stride(0) == t.shape[1] for t in (source, codes, scales))
    if dense and cols % 32 == 0 and rows * cols < 1 << 31:
        rows, cols = 1, rows * cols
    tile = _block_tile(rows, cols)
    grid = _grid(rows, cols, tile["R"], 32 * tile["B"])
    partials = _partials(source, grid, measured)
    mx.quantize_mx[grid](
        _bits(source), _bits(codes), scales, partials, nonfinite, rows, cols,
        source.stride(0), codes.stride(0), scales.stride(0),
        **mx_constants(fmt), KNOWN=known, MEASURE=measured, **tile, num_warps=4, **EXACT,
    )  # fmt: skip
    return partials


def _quantize_scaled(
    fmt: WeightFormat,
    source: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nonfinite: torch.Tensor,
    measured: bool,
    known: bool,
) -> torch.Tensor:
    """Launch, and return the partial statistics."""
    rows, cols = source.shape
    strides = (source.stride(0), codes.stride(0), scales.stride(0))
    common = {**_rule(fmt), "KNOWN": known, "MEASURE": measured, **EXACT}
    if _group(fmt) == "row":
        tile = row_tile(cols)
        grid = (-(-rows // tile["R"]),)
        partials = _partials(source, grid, measured)
        scaled.quantize_rows[grid](
            _bits(source), _bits(codes), scales, partials, nonfinite, rows, cols, *strides,
            **common, **tile, num_warps=4,
        )  # fmt: skip
        return partials
    tile, warps = _scaled_tile(fmt, cols)
    grid = _grid(rows, cols, tile["R"], tile["C"])
    partials = _partials(source, grid, measured)
    scaled.quantize_tiles[grid](
        _bits(source), _bits(codes), scales, partials, nonfinite, rows, cols, *strides,
        **common, BLOCKS=bool(fmt.block_rows), **tile, num_warps=warps,
    )  # fmt: skip
    return partials


def mx_constants(fmt: WeightFormat) -> dict[str, Any]:
    """The constants of an MX format's elements and scale rule."""
    element = ELEMENTS[fmt.name]
    return {
        "CODE_BITS": fmt.code_bits,
        "MANTISSA": element.mantissa_bits,
        "BIAS": element.bias,
        "LARGEST": element.largest,
        "EMAX": element.emax,
        "THRESHOLD": element.threshold,
    }


def _rule(fmt: WeightFormat) -> dict[str, Any]:
    name = _OCP.get(fmt.name, fmt.name)
    return {"RULE": _RULES.get(name, name), "FNUZ": fmt.name in _OCP}


def _group(fmt: WeightFormat) -> str:
    """What one scale serves."""
    return "all" if not fmt.block_rows else "row" if fmt.block_rows == 1 else "block"


def row_tile(cols: int) -> dict[str, int]:
    """Rows and columns that a program works on at a time where it makes whole rows."""
    width = min(_power_of_two(cols), ROW_TILE)
    return {"R": ROW_TILE // width, "C": width}


def _block_tile(rows: int, cols: int) -> dict[str, int]:
    """Rows, and blocks of 32 columns, of a tile."""
    width = TILE if rows == 1 else min(max(_power_of_two(cols), 32), WIDEST)
    return {"R": TILE // width, "B": width // 32}


def _scaled_tile(fmt: WeightFormat, cols: int) -> tuple[dict[str, int], int]:
    """Rows and columns of a tile, and how many warps work on it: a scale block is one tile."""
    if fmt.block_rows > 1:
        return {"R": fmt.block_rows, "C": fmt.block_cols}, 8
    width = min(_power_of_two(cols), WIDEST)
    return {"R": TILE // width, "C": width}, 4


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below a positive number; at least 16."""
    return max(16, 1 << (value - 1).bit_length())


def _grid(rows: int, cols: int, tile_rows: int, tile_cols: int) -> tuple[int]:
    return (-(-rows // tile_rows) * -(-cols // tile_cols),)


def _partials(source: torch.Tensor, grid: tuple[int], measured: bool) -> torch.Tensor:
    return torch.empty(PARTIALS, grid[0] if measured else 0, dtype=torch.float64, device=source.device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose type every target loads and stores: BF16 and FP8 as integers, the others as they are."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    return tensor.view(torch.uint8) if tensor.dtype.is_floating_point and tensor.itemsize == 1 else tensor


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The device that launches go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
