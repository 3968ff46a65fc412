"""Pieces of weights that stay as stored: codes and scales are copied, each for itself, in any order."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from ..checkpoint.pieces import Piece
from ..checkpoint.workspace import Workspace
from ..errors import CheckpointError
from ..model.routes import Span
from ..schemes.stored.weights import StoredWeight
from .cuts import Sink
from .regions import Interval
from .slabs import Slab, SlabPart, lines_per_slab, rows_of, slabs
from .stored import check_codes
from .stored_parts import PartMatrix, all_but_codes, codes_of


def plan_kept(
    weight: StoredWeight, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int
) -> Iterator[Piece]:
    """The pieces of one weight; every sink of it has the closures of a stored parameter."""
    codes = codes_of(weight)
    for slab in slabs(weight, spans, lines_per_slab(codes.row_bytes, weight.step, chunk_bytes)):
        yield _codes_piece(codes, slab, sinks)
    for matrix in all_but_codes(weight):
        for rows in matrix.ranges(chunk_bytes):
            yield matrix.piece(rows, functools.partial(_deliver_scales, matrix, rows, spans, sinks))
    yield from _input_scale_pieces(weight, spans, sinks)


def _codes_piece(codes: PartMatrix, slab: Slab, sinks: Mapping[str, Sink]) -> Piece:
    lines = slab.low, slab.high
    only, entry = slab.parts[0], codes.part.entry
    whole = len(slab.parts) == 1 and only.rows == slice(0, slab.lines, 1) and codes.weight.along == "rows"
    loader = sinks[only.span.parameter].loader
    if whole and codes.part.convert is None and loader.accepts_bytes(only.region):

        def arrived(workspace: Workspace) -> None:
            check_codes(entry.name, workspace.buffer.view(entry.dtype))
            loader.commit(only.region)

        return codes.piece(lines, arrived, target=functools.partial(loader.direct_target, only.region))

    def deliver(workspace: Workspace) -> None:
        values = codes.canonical(workspace.buffer, lines)
        for part in slab.parts:
            sink = sinks[part.span.parameter]
            sink.loader(sink.param, values[part.rows], region=part.region)

    return codes.piece(lines, deliver)


def _deliver_scales(
    matrix: PartMatrix, rows: Interval, spans: Sequence[Span], sinks: Mapping[str, Sink], workspace: Workspace
) -> None:
    """Hand over some rows of scales or zero points; one that must be zero is checked as it is converted."""
    values, weight = matrix.canonical(workspace.buffer, rows), matrix.weight
    if matrix.part.role == "must_be_zero":
        return
    lines = matrix.lines(rows)
    for taken in (rows_of(weight, span) for span in spans):
        part = taken.columns_part(lines) if weight.along == "columns" else taken.part(*lines)
        if part is not None:
            sink = sinks[part.span.parameter]
            loader = sink.loader.progress.loader(sink.loader.parameter, matrix.part.role)
            loader(sink.param, values[_scale_rows(matrix, part)], region=part.region)


def _scale_rows(matrix: PartMatrix, part: SlabPart) -> slice:
    """The rows of some scales that belong to a part."""
    rows, block = part.rows, matrix.weight.format.block_rows
    if block == 1:
        return rows
    if block and (rows.step != 1 or rows.start % block):
        raise CheckpointError(
            f"{matrix.part.entry.name}: blocks of {block} rows lie across the border of what is one matrix in the "
            f"model ({part.span.parameter}, {part.region}), so their scales cannot be kept: choose a quantization"
        )
    return slice(rows.start // block, -(-rows.stop // block)) if block else slice(None)


def _input_scale_pieces(weight: StoredWeight, spans: Sequence[Span], sinks: Mapping[str, Sink]) -> Iterator[Piece]:
    """The static scale of the activations, where the scheme has a use for it."""
    entry = None if weight.activations is None else weight.activations.scale
    sink = sinks[spans[0].parameter]
    loader = sink.loader.progress.loader(sink.loader.parameter, "input_scale")
    if entry is None or loader is None:
        return

    def deliver(workspace: Workspace) -> None:
        loader(sink.param, workspace.buffer.view(entry.dtype))

    yield Piece(entry.shard, ((entry.offset, entry.nbytes),), deliver)
