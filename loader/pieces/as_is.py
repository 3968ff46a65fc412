"""Pieces of weights that stay as stored: codes and scales are copied, each for itself, in any order."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from ..checkpoint.pieces import Piece
from ..checkpoint.workspace import Workspace
from ..errors import CheckpointError
from ..geometry.regions import Interval
from ..geometry.spans import Span
from ..schemes.stored.checks import check_codes
from ..schemes.stored.weights import StoredWeight, scale_roles
from .as_is_bundles import AsIs, AsIsBundler
from .slabs import Slab, SlabRegion, rows_of, slabs
from .stored_parts import TensorMatrix, codes_of
from .stored_stacks import Families


def plan_as_is(
    weights: Sequence[StoredWeight], spans: Mapping[str, Sequence[Span]], as_is: AsIs, chunk_bytes: int
) -> list[Piece]:
    """The pieces of some weights by shard and offset; every parameter they go to stays as it is stored."""
    pieces: list[Piece] = []
    families, bundler = Families(), AsIsBundler(as_is, chunk_bytes)
    for weight in weights:
        taken, family = spans[weight.name], families.of(weight)
        whole = family.whole_span(taken)
        for part, matrix in zip(weight.parts, family.matrices, strict=True):
            if whole is not None and bundler.takes(part.entry.nbytes):
                bundler.add(part.entry, weight, matrix, whole)
            elif part.role == "codes":
                pieces += _codes_pieces(codes_of(weight), taken, as_is, chunk_bytes)
            else:
                pieces += _other_pieces(TensorMatrix(weight, part), taken, as_is, chunk_bytes)
        if weight.input_scale is not None and family.input_scale is not None:
            bundler.add(weight.input_scale, weight, family.input_scale, taken[0])
    pieces += bundler.pieces()
    return sorted(pieces, key=lambda piece: (piece.shard, piece.extents[0][0]))


def _codes_pieces(codes: TensorMatrix, spans: Sequence[Span], as_is: AsIs, chunk_bytes: int) -> Iterator[Piece]:
    """The codes of a weight, read straight into their final storage where they lie there as they are stored."""
    weight = codes.weight
    for slab in slabs(weight, spans, codes.lines_within(chunk_bytes, weight.step)):
        yield _codes_piece(codes, slab, as_is)


def _codes_piece(codes: TensorMatrix, slab: Slab, as_is: AsIs) -> Piece:
    rows = codes.rows_of((slab.low, slab.high))
    only, entry = slab.parts[0], codes.part.entry
    whole = len(slab.parts) == 1 and only.rows == slice(0, slab.lines, 1) and codes.weight.along == "rows"
    whole = whole and codes.part.convert is None and only.columns == slice(0, codes.weight.columns)
    place = as_is[only.span.parameter]["codes"].in_place(entry.dtype, only.region) if whole else None
    if place is not None:

        def arrived(workspace: Workspace) -> None:
            check_codes(entry.name, workspace.buffer.view(entry.dtype))
            place.arrived()

        return codes.piece(rows, arrived, target=place.target)

    def deliver(workspace: Workspace) -> None:
        values = codes.canonical(workspace.buffer, rows)
        for part in slab.parts:
            columns = codes.weight.format.tensors[0].columns(part.columns.start, part.columns.stop, part.columns.stop)
            as_is[part.span.parameter]["codes"].load_region(values[part.rows, columns], part.region)

    return codes.piece(rows, deliver)


def _other_pieces(matrix: TensorMatrix, spans: Sequence[Span], as_is: AsIs, chunk_bytes: int) -> Iterator[Piece]:
    """Scales, zero points, and what is only checked."""
    for rows in matrix.ranges(chunk_bytes):
        yield matrix.piece(rows, functools.partial(_deliver_scales, matrix, rows, spans, as_is))


def _deliver_scales(
    matrix: TensorMatrix, rows: Interval, spans: Sequence[Span], as_is: AsIs, workspace: Workspace
) -> None:
    """Hand over some rows of scales or zero points."""
    values, weight = matrix.canonical(workspace.buffer, rows), matrix.weight
    if matrix.part.only_checked:
        return
    lines = matrix.lines(rows)
    for taken in (rows_of(weight, span) for span in spans):
        part = taken.columns_part(*lines) if weight.along == "columns" else taken.part(*lines)
        if part is not None:
            sink = as_is[part.span.parameter][matrix.part.role]
            sink.load_region(values[_scale_rows(matrix, part), _scale_columns(matrix, part)], part.region)


def _scale_columns(matrix: TensorMatrix, part: SlabRegion) -> slice:
    """The columns of some scales that belong to a part: all where a row has more beside."""
    number, _ = scale_roles(matrix.weight.format)[matrix.part.role]
    scale = matrix.weight.format.scales[number]
    if scale.beside or not scale.block_cols:
        return slice(None)
    return slice(part.columns.start // scale.block_cols, -(-part.columns.stop // scale.block_cols))


def _scale_rows(matrix: TensorMatrix, part: SlabRegion) -> slice:
    """The rows of some scales that belong to a part."""
    fmt = matrix.weight.format
    tensor, _ = scale_roles(fmt)[matrix.part.role]
    rows, block = part.rows, fmt.scales[tensor].block_rows
    if block == 1:
        return rows
    if block and (rows.step != 1 or rows.start % block):
        raise CheckpointError(
            f"{matrix.part.entry.name}: blocks of {block} rows lie across the border of what is one matrix in the "
            f"model ({part.span.parameter}, {part.region}), so their scales cannot be copied: choose a quantization"
        )
    return slice(rows.start // block, -(-rows.stop // block)) if block else slice(None)
