"""Pieces of weights that stay as stored: codes and scales are copied, each for itself, in any order."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from ..checkpoint.pieces import Piece
from ..checkpoint.workspace import Workspace
from ..errors import CheckpointError
from ..geometry.regions import Interval
from ..geometry.spans import Span
from ..online.sink import Sink
from ..schemes.stored.checks import check_codes
from ..schemes.stored.weights import StoredWeight
from .as_is_bundles import KeptBundler
from .slabs import Slab, SlabPart, rows_of, slabs
from .stored_parts import PartMatrix, codes_of
from .stored_stacks import Families


def plan_kept(
    weights: Sequence[StoredWeight], spans: Mapping[str, Sequence[Span]], sinks: Mapping[str, Sink], chunk_bytes: int
) -> list[Piece]:
    """The pieces of some weights by shard and offset; every sink of them has the closures of a stored parameter."""
    pieces: list[Piece] = []
    families, bundler = Families(), KeptBundler(sinks, chunk_bytes)
    for weight in weights:
        taken, family = spans[weight.name], families.of(weight)
        whole = family.whole_span(taken)
        for part, matrix in zip(weight.parts, family.matrices, strict=True):
            if whole is not None and bundler.takes(part.entry.nbytes):
                bundler.add(part.entry, weight, matrix, whole)
            elif part.role == "codes":
                pieces += _codes_pieces(codes_of(weight), taken, sinks, chunk_bytes)
            else:
                pieces += _other_pieces(PartMatrix(weight, part), taken, sinks, chunk_bytes)
        if weight.input_scale is not None and family.input_scale is not None:
            bundler.add(weight.input_scale, weight, family.input_scale, taken[0])
    pieces += bundler.pieces()
    return sorted(pieces, key=lambda piece: (piece.shard, piece.extents[0][0]))


def _codes_pieces(
    codes: PartMatrix, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int
) -> Iterator[Piece]:
    """The codes of a weight, read straight into their final storage where they lie there as they are stored."""
    weight = codes.weight
    for slab in slabs(weight, spans, codes.lines_within(chunk_bytes, weight.step)):
        yield _codes_piece(codes, slab, sinks)


def _codes_piece(codes: PartMatrix, slab: Slab, sinks: Mapping[str, Sink]) -> Piece:
    rows = codes.rows_of((slab.low, slab.high))
    only, entry = slab.parts[0], codes.part.entry
    whole = len(slab.parts) == 1 and only.rows == slice(0, slab.lines, 1) and codes.weight.along == "rows"
    loader = sinks[only.span.parameter].loader
    if whole and codes.part.convert is None and loader.accepts_bytes(only.region):

        def arrived(workspace: Workspace) -> None:
            check_codes(entry.name, workspace.buffer.view(entry.dtype))
            loader.commit(only.region.numel)

        return codes.piece(rows, arrived, target=functools.partial(loader.direct_target, only.region))

    def deliver(workspace: Workspace) -> None:
        values = codes.canonical(workspace.buffer, rows)
        for part in slab.parts:
            sink = sinks[part.span.parameter]
            sink.loader(sink.param, values[part.rows], region=part.region)

    return codes.piece(rows, deliver)


def _other_pieces(
    matrix: PartMatrix, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int
) -> Iterator[Piece]:
    """Scales, zero points, and what is only checked."""
    for rows in matrix.ranges(chunk_bytes):
        yield matrix.piece(rows, functools.partial(_deliver_scales, matrix, rows, spans, sinks))


def _deliver_scales(
    matrix: PartMatrix, rows: Interval, spans: Sequence[Span], sinks: Mapping[str, Sink], workspace: Workspace
) -> None:
    """Hand over some rows of scales or zero points."""
    values, weight = matrix.canonical(workspace.buffer, rows), matrix.weight
    if matrix.part.only_checked:
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
