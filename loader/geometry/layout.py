"""Where the codes and scales of a quantized parameter lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..kernels.formats import WeightFormat
from .regions import Interval, Region

ShardId = str | int | tuple[int, ...] | None
"""A part of a merged parameter: its name (`q`, `w1`), its number from the top, or several numbers; `None`: all."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a region inside one shard, with the slices of codes and scales that belong to it.

    `rows` are relative to the region. `whole` says whether it covers whole scale blocks, so that its scales depend
    on nothing else.
    """

    rows: Interval
    code_index: tuple[slice, slice]
    scale_index: tuple[slice, slice]
    whole: bool


@dataclass(frozen=True, slots=True)
class Part:
    """One shard of a matrix: its rows in the weight, and where its codes and scales lie in the tensors."""

    rows: slice
    codes: tuple[slice, slice]
    scales: tuple[slice, slice]


@dataclass(frozen=True)
class WeightLayout:
    """Codes and scales of one parameter: `experts` matrices (None: one), each a stack of `shards` of `columns`.

    `shards` are (shard_id, rows) from top to bottom, such as `(("w1", I), ("w3", I))`; every shard is quantized on
    its own, so no scale block reaches over its border. Orientation is canonical, [N, K], whatever the module has.
    The tensors have room for the rows of each shard, and for the columns, rounded up to `multiples` of both, as a
    kernel may want it; `clear_padding` writes the zeros.
    """

    format: WeightFormat
    experts: int | None
    shards: tuple[tuple[str, int], ...]
    columns: int
    multiples: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        """Output features of one matrix."""
        return sum(rows for _, rows in self.shards)

    @property
    def numel(self) -> int:
        """Weights, all experts together."""
        return (self.experts or 1) * self.rows * self.columns

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the codes, experts first."""
        rows = sum(self._padded_rows(rows) for _, rows in self.shards)
        return (*self._leading, rows, self.format.code_shape(1, self._padded_columns)[1])

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales, experts first."""
        rows = sum(self._scale_rows(self._padded_rows(rows)) for _, rows in self.shards)
        return (*self._leading, rows, self.format.scale_shape(1, self._padded_columns)[1])

    @property
    def tensors(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Dtype and shape of the codes, then of the scales."""
        return (self.format.code_dtype, self.code_shape), (self.format.scale_dtype, self.scale_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        codes, scales = torch.Size(self.code_shape).numel(), torch.Size(self.scale_shape).numel()
        return codes * self.format.code_dtype.itemsize + scales * self.format.scale_dtype.itemsize

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns that a piece must come in multiples of, to hold whole scale blocks, or bytes, of codes."""
        columns = self.columns if self.format.whole_rows else self.format.block_cols or self.format.packed
        return self.format.block_rows or 1, max(columns, 1)

    @property
    def is_padded(self) -> bool:
        """Whether the tensors are larger than the weight needs."""
        return self._padded_columns != self.columns or any(self._padded_rows(rows) != rows for _, rows in self.shards)

    @property
    def scales_follow_rows(self) -> bool:
        """Whether a scale row belongs to a fixed number of rows all through, across shard borders too."""
        block = self.format.block_rows
        return len(self.shards) == 1 or (block > 0 and all(rows % block == 0 for _, rows in self.shards))

    def shard_rows(self, shard_id: ShardId) -> Interval:
        """Rows of a shard; `None`, or `w13` for gate and up together, means all of them.

        Raises `KeyError` for a shard that is not there, and for several that do not lie one below the other.
        """
        names = [name for name, _ in self.shards]
        if shard_id is None or (shard_id == "w13" and names[0] == "w1"):
            return 0, self.rows
        numbers = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        wanted = [names.index(each) if each in names else each for each in numbers]
        first = wanted[0] if wanted else None
        if not isinstance(first, int) or first < 0 or wanted != list(range(first, first + len(wanted))):
            raise KeyError(f"no shard {shard_id!r}; there are {', '.join(map(repr, names))}")
        borders = self.shard_borders()
        if first + len(wanted) >= len(borders):
            raise KeyError(f"no shard {shard_id!r}; there are {', '.join(map(repr, names))}")
        return borders[first], borders[first + len(wanted)]

    def shard_borders(self) -> list[int]:
        """Rows at which a shard begins, the end included."""
        borders = [0]
        for _, rows in self.shards:
            borders.append(borders[-1] + rows)
        return borders

    def parts(self) -> Iterator[Part]:
        """The shards, without their padding."""
        width, scale_width = self.format.code_shape(1, self.columns)[1], self.format.scale_shape(1, self.columns)[1]
        for first, code_start, scale_start, rows in self._starts():
            yield Part(
                slice(first, first + rows),
                (slice(code_start, code_start + rows), slice(0, width)),
                (slice(scale_start, scale_start + self._scale_rows(rows)), slice(0, scale_width)),
            )

    def clear_padding(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Write zeros to what `codes` and `scales`, of the shapes here, hold beside the weight."""
        parts = list(self.parts()) if self.is_padded else []
        for tensor, kept in ((codes, [part.codes for part in parts]), (scales, [part.scales for part in parts])):
            ends = [rows.start for rows, _ in kept[1:]] + [tensor.shape[-2]]
            for (rows, columns), end in zip(kept, ends, strict=bool(parts)):
                tensor[..., rows.start : end, columns.stop :] = 0
                tensor[..., rows.stop : end, :] = 0

    def blocks(self, region: Region) -> Iterator[Block]:
        """Cut a region at the shard borders."""
        first, last = region.rows
        for shard_start, code_start, scale_start, rows in self._starts():
            low, high = max(first, shard_start), min(last, shard_start + rows)
            if low < high:
                yield self._block(region, (low, high), (shard_start, shard_start + rows), (code_start, scale_start))

    def whole(self, region: Region) -> bool:
        """Whether the region covers whole scale blocks only."""
        return all(block.whole for block in self.blocks(region))

    def code_aligned(self, region: Region) -> bool:
        """Whether the region begins and ends at a byte of codes, and at a scale where scales cannot be revised."""
        step = self.align[1] if self.format.packed > 1 else 1
        low, high = region.columns
        return low % step == 0 and (high % step == 0 or high == self.columns)

    def _starts(self) -> Iterator[tuple[int, int, int, int]]:
        """Of each shard where it begins in the weight, the codes and the scales, and its rows."""
        row = code = scale = 0
        for _, rows in self.shards:
            yield row, code, scale, rows
            row, code = row + rows, code + self._padded_rows(rows)
            scale += self._scale_rows(self._padded_rows(rows))

    def _block(self, region: Region, rows: Interval, shard: Interval, starts: Interval) -> Block:
        fmt, (first, last), (code_start, scale_start) = self.format, region.columns, starts
        last_code = fmt.code_shape(1, self.columns)[1] if last == self.columns else fmt.code_column(last)
        code_columns = slice(fmt.code_column(first), last_code)
        columns = fmt.scale_columns(first, last, self.columns)
        row_blocks, rows_whole = _cover(rows[0] - shard[0], rows[1] - shard[0], shard[1] - shard[0], fmt.block_rows)
        _, columns_whole = _cover(first, last, self.columns, fmt.block_cols)
        return Block(
            rows=(rows[0] - region.rows[0], rows[1] - region.rows[0]),
            code_index=(slice(rows[0] - shard[0] + code_start, rows[1] - shard[0] + code_start), code_columns),
            scale_index=(slice(scale_start + row_blocks[0], scale_start + row_blocks[1]), columns),
            whole=rows_whole and columns_whole,
        )

    @property
    def _leading(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def _padded_columns(self) -> int:
        return -(-self.columns // self.multiples[1]) * self.multiples[1]

    def _padded_rows(self, rows: int) -> int:
        return -(-rows // self.multiples[0]) * self.multiples[0]

    def _scale_rows(self, rows: int) -> int:
        return self.format.scale_shape(rows, self.columns)[0]


def _cover(first: int, last: int, extent: int, block: int) -> tuple[Interval, bool]:
    """Scale indices that elements `first:last` of `extent` touch, and whether they fill them; block 0: one scale."""
    size = block or max(extent, 1)
    whole = first % size == 0 and (last % size == 0 or last == extent)
    return (first // size, -(-last // size)), whole
