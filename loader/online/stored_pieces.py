"""Pieces of stored weights: straight into the model where it keeps the format, through float32 where it does not.

What is kept as stored is copied, codes and scales each for itself, in any order. What is not is dequantized piece by
piece: the scales of a tensor come first and are held until its last codes have come, and a slab of codes becomes a
float32 matrix in the worker's scratch buffer, which goes to the same closures as the piece of a high-precision tensor.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.pieces import Barrier, Piece
from ..checkpoint.workspace import Workspace
from ..errors import CheckpointError
from ..kernels.reference import scale_rows
from ..model.routes import Span
from ..schemes.stored.weights import StoredPart, StoredWeight
from .cuts import Sink
from .slabs import Slab, SlabPart, lines_per_slab, rows_of, slabs
from .stored import StoredCodesLoader, check_codes, check_finite
from .two_passes import first_pass, read_twice, together

FLOAT_BYTES = 4

Dequantize = Callable[[Tensor, Tensor, Tensor], None]


@dataclass
class StoredPieces:
    """Pieces, the bytes of scratch memory the largest one takes, and the bytes of scales that are held beside it."""

    pieces: list[Piece] = field(default_factory=list)
    scratch_bytes: int = 0
    held_bytes: int = 0


def plan_stored(
    weights: Sequence[StoredWeight],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
    dequantizer: Callable[[str], Dequantize],
) -> StoredPieces:
    """Pieces of all stored weights; `dequantizer(format name)` gives the kernel for those that are not kept."""
    planned = StoredPieces()
    anew: list[_Anew] = []
    for weight in weights:
        loaders = {span.parameter: sinks[span.parameter].loader for span in spans[weight.name]}
        if all(isinstance(loader, StoredCodesLoader) for loader in loaders.values()):
            planned.pieces += _kept(weight, spans[weight.name], sinks, chunk_bytes)
        else:
            anew.append(_Anew(weight, dequantizer(weight.format.name)))
    _dequantized(anew, spans, sinks, chunk_bytes, planned)
    return planned


# Kept as stored


def _kept(weight: StoredWeight, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int) -> list[Piece]:
    lines = lines_per_slab(_line_bytes(weight.codes, weight), weight.step, chunk_bytes)
    pieces = [_codes_piece(weight, slab, sinks) for slab in slabs(weight, spans, lines)]
    for part in weight.parts:
        if part.role != "codes":
            pieces += _other_pieces(weight, part, spans, sinks, chunk_bytes)
    return pieces + _input_scale_pieces(weight, spans, sinks)


def _input_scale_pieces(weight: StoredWeight, spans: Sequence[Span], sinks: Mapping[str, Sink]) -> list[Piece]:
    entry = None if weight.activations is None else weight.activations.scale
    sink = sinks[spans[0].parameter]
    loader = sink.loader.progress.loader(sink.loader.parameter, "input_scale")
    if entry is None or loader is None:
        return []

    def deliver(workspace: Workspace) -> None:
        loader(sink.param, workspace.buffer.view(entry.dtype))

    return [Piece(entry.shard, ((entry.offset, entry.nbytes),), deliver)]


def _codes_piece(weight: StoredWeight, slab: Slab, sinks: Mapping[str, Sink]) -> Piece:
    part = weight.codes
    extents = _extents(part, weight, slab.low, slab.high)
    only = slab.parts[0]
    whole = len(slab.parts) == 1 and only.rows == slice(0, slab.lines, 1) and weight.along == "rows"
    if whole and part.convert is None:
        loader = sinks[only.span.parameter].loader
        if loader.accepts_bytes(only.region):

            def arrived(workspace: Workspace) -> None:
                check_codes(part.entry.name, workspace.buffer.view(part.entry.dtype))
                loader.commit(only.region)

            target = functools.partial(loader.direct_target, only.region)
            return Piece(part.entry.shard, extents, arrived, target=target)

    def deliver(workspace: Workspace) -> None:
        codes = _canonical(part, weight, workspace.buffer, slab.lines).view(weight.format.code_dtype)
        for each in slab.parts:
            sink = sinks[each.span.parameter]
            sink.loader(sink.param, codes[each.rows], region=each.region)

    return Piece(part.entry.shard, extents, deliver)


def _other_pieces(
    weight: StoredWeight, part: StoredPart, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int
) -> list[Piece]:
    """Pieces of scales or zero points, or of a tensor that is only checked."""
    rows = _part_rows(part, weight)
    step = lines_per_slab(_line_bytes(part, weight), 1, chunk_bytes)
    taken = [rows_of(weight, span) for span in spans]

    def deliver(workspace: Workspace, low: int, high: int) -> None:
        values = _canonical(part, weight, workspace.buffer, high - low)
        if part.role == "must_be_zero":
            return
        first, last = _lines(part, weight, low, high)
        for each in taken:
            landed = each.columns_part((first, last)) if weight.along == "columns" else each.part(first, last)
            if landed is not None:
                sink = sinks[landed.span.parameter]
                loader = sink.loader.progress.loader(sink.loader.parameter, part.role)
                loader(sink.param, values[_scale_slice(weight, part, landed)], region=landed.region)

    return [
        Piece(
            part.entry.shard,
            _extents(part, weight, low, min(low + step, rows), part_rows=True),
            functools.partial(deliver, low=low, high=min(low + step, rows)),
        )
        for low in range(0, rows, step)
    ]


def _scale_slice(weight: StoredWeight, part: StoredPart, landed: SlabPart) -> slice:
    """The rows of some scales that belong to a part."""
    rows, block = landed.rows, weight.format.block_rows
    if block == 1:
        return rows
    if block and (rows.step != 1 or rows.start % block):
        raise CheckpointError(
            f"{part.entry.name}: blocks of {block} rows lie across the border of what is one matrix in the model "
            f"({landed.span.parameter}, {landed.region}), so their scales cannot be kept: choose a quantization"
        )
    return slice(rows.start // block, -(-rows.stop // block)) if block else slice(None)


# Dequantized


class _Anew:
    """A stored weight that becomes something else, and its scales from their arrival to the last slab of codes."""

    def __init__(self, weight: StoredWeight, dequantize: Dequantize) -> None:
        self.weight, self._dequantize = weight, dequantize
        self.name, self.shard, self.offset = weight.name, weight.shard, weight.offset
        self.scales_there: Barrier | None = None
        self._scales: Tensor | None = None
        self._slabs_left = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the scales."""
        shape = self.weight.format.scale_shape(self.weight.all_rows, self.weight.columns)
        return math.prod(shape) * self.weight.format.scale_dtype.itemsize

    def cut(self, spans: Sequence[Span], sinks: Mapping[str, Sink], limit: int) -> list[Slab]:
        """Slabs whose float32 values take at most `limit` bytes, where the scale blocks allow it."""
        weight = self.weight
        axis = 0 if weight.along == "rows" else 1
        block = (weight.format.block_rows, weight.format.block_cols)[axis] or 1
        step = math.lcm(weight.step, block, *(sinks[span.parameter].align[axis] for span in spans))
        across = weight.columns if axis == 0 else weight.all_rows
        while axis == 0 and step % 2 == 0 and step * across * FLOAT_BYTES > limit:
            step //= 2  # a part of a row of blocks: what it lands in may have to be observed first
        found = list(slabs(weight, spans, lines_per_slab(across * FLOAT_BYTES, step, limit)))
        self._slabs_left = len(found)
        return found

    def scratch_bytes(self, slab: Slab) -> int:
        """Bytes of a slab's float32 values."""
        return slab.lines * (self.weight.columns if self.weight.along == "rows" else self.weight.all_rows) * FLOAT_BYTES

    def scale_pieces(self, chunk_bytes: int) -> list[Piece]:
        """Pieces of the scales and zero points; the barrier opens behind them."""
        pieces: list[Piece] = []
        for part in self.weight.parts:
            if part.role == "codes":
                continue
            rows, step = (
                _part_rows(part, self.weight),
                lines_per_slab(_line_bytes(part, self.weight), 1, chunk_bytes),
            )
            for low in range(0, rows, step):
                high = min(low + step, rows)
                extents = _extents(part, self.weight, low, high, part_rows=True)
                pieces.append(Piece(part.entry.shard, extents, functools.partial(self._hold, part, low, high)))
        self.scales_there = Barrier(len(pieces))
        for piece in pieces:
            piece.signal = self.scales_there
        return pieces

    def codes_piece(
        self,
        slab: Slab,
        parts: tuple[SlabPart, ...],
        sinks: Mapping[str, Sink],
        observe: bool,
        after: Barrier | None,
    ) -> Piece:
        """The piece that dequantizes a slab and hands over some of its parts."""
        part = self.weight.codes

        def deliver(workspace: Workspace) -> None:
            values = self._values(workspace, slab)
            for each in parts:
                sink = sinks[each.span.parameter]
                if observe:
                    sink.loader.observe(values[each.rows], each.region)
                else:
                    sink.loader(sink.param, values[each.rows], region=each.region)
            if not observe:
                self._done()

        extents = _extents(part, self.weight, slab.low, slab.high)
        return Piece(part.entry.shard, extents, deliver, after=after or self.scales_there)

    def _hold(self, part: StoredPart, low: int, high: int, workspace: Workspace) -> None:
        weight, fmt = self.weight, self.weight.format
        values = _canonical(part, weight, workspace.buffer, high - low)
        if part.role == "must_be_zero":
            return
        check_finite(part.entry.name, values)
        with self._lock:
            if self._scales is None:
                shape = fmt.scale_shape(weight.all_rows, weight.columns)
                self._scales = torch.empty(shape, dtype=fmt.scale_dtype, device=values.device)
                if fmt.scale_words > 1:
                    self._scales[:, 1 :: fmt.scale_words] = weight.zero_point
            word = self._scales[:, 1 if part.role == "zero_point" else 0 :: fmt.scale_words]
        first, last = _lines(part, weight, low, high)
        if weight.along == "columns":
            group = fmt.block_cols or weight.columns
            word[:, first // group : -(-last // group)] = values
        else:
            block = fmt.block_rows or weight.all_rows
            word[first // block : -(-last // block)] = values

    def _values(self, workspace: Workspace, slab: Slab) -> Tensor:
        weight, fmt, scales = self.weight, self.weight.format, self._scales
        assert scales is not None
        codes = _canonical(weight.codes, weight, workspace.buffer, slab.lines).view(fmt.code_dtype)
        if weight.along == "columns":
            group = fmt.block_cols or weight.columns
            words = slice(slab.low // group * fmt.scale_words, -(-slab.high // group) * fmt.scale_words)
            shape, scales = (weight.all_rows, slab.lines), scales[:, words]
        else:
            shape, scales = (slab.lines, weight.columns), scale_rows(fmt, scales, slab.low, slab.high)
        values = workspace.scratch(self.scratch_bytes(slab)).view(torch.float32).view(shape)
        self._dequantize(codes, scales, values)
        return values

    def _done(self) -> None:
        with self._lock:
            self._slabs_left -= 1
            if self._slabs_left == 0:
                self._scales = None


def _dequantized(
    anew: Sequence[_Anew],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
    planned: StoredPieces,
) -> None:
    cuts = {each.name: each.cut(spans[each.name], sinks, chunk_bytes) for each in anew}
    twice = read_twice(cuts.values(), sinks)

    def observing(each: _Anew, slab: Slab, parts: tuple[Any, ...]) -> Piece:
        return each.codes_piece(slab, parts, sinks, True, None)

    for group in together(anew, cuts, twice):
        for each in group:
            planned.pieces += each.scale_pieces(chunk_bytes)
        barrier = first_pass(group, cuts, twice, observing, planned.pieces)
        for each in group:
            planned.pieces += [each.codes_piece(slab, slab.parts, sinks, False, barrier) for slab in cuts[each.name]]
        planned.held_bytes = max(planned.held_bytes, sum(each.held_bytes for each in group))
    scratch = (each.scratch_bytes(slab) for each in anew for slab in cuts[each.name])
    planned.scratch_bytes = max(scratch, default=0)


# The tensors of a weight, seen as matrices


def _part_rows(part: StoredPart, weight: StoredWeight) -> int:
    return -(-weight.lines // part.block) if part.block else 1


def _line_bytes(part: StoredPart, weight: StoredWeight) -> int:
    rows = _part_rows(part, weight)
    if part.entry.nbytes % max(rows, 1):
        raise CheckpointError(
            f"{part.entry.name} has shape {part.entry.shape}, which is not {rows} rows as {weight.name} of "
            f"{weight.all_rows} x {weight.columns} needs; copy the checkpoint again, or correct its config.json"
        )
    return part.entry.nbytes // max(rows, 1)


def _lines(part: StoredPart, weight: StoredWeight, low: int, high: int) -> tuple[int, int]:
    """The rows or columns of the weight that some rows of a part stand for."""
    return (low * part.block, min(high * part.block, weight.lines)) if part.block else (0, weight.lines)


def _extents(
    part: StoredPart, weight: StoredWeight, low: int, high: int, part_rows: bool = False
) -> tuple[tuple[int, int], ...]:
    if not part_rows and part.block != 1:
        raise CheckpointError(f"{part.entry.name}: the codes of {weight.name} do not lie line by line")
    size = _line_bytes(part, weight)
    return ((part.entry.offset + low * size, (high - low) * size),)


def _canonical(part: StoredPart, weight: StoredWeight, buffer: Tensor, rows: int) -> Tensor:
    """Some rows of a part in the canonical layout."""
    stored = buffer.view(part.entry.dtype).view(rows, -1)
    if part.role == "codes":
        check_codes(part.entry.name, stored)
    return stored if part.convert is None else part.convert(stored)
