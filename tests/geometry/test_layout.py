"""Where codes and scales lie: shapes, and the blocks of any region, shard borders included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.kernels.formats import FORMATS, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, MXFP4, WeightFormat

TINY = WeightFormat("tiny", torch.uint8, torch.float32, 3, 4, 1)


def gate_up(fmt: WeightFormat, half: int, columns: int, experts: int | None = None) -> WeightLayout:
    return WeightLayout(fmt, experts, (("w1", half), ("w3", half)), columns)


@pytest.mark.parametrize(
    ("fmt", "rows", "columns", "codes", "scales"),
    [
        (MXFP4, 5, 64, (5, 32), (5, 2)),
        (MXFP4, 5, 80, (5, 48), (5, 3)),  # padded to 96
        (MXFP4, 5, 33, (5, 32), (5, 2)),
        (MXFP4, 1, 1, (1, 16), (1, 1)),
        (FP8_TENSOR, 5, 33, (5, 33), (1, 1)),
        (FP8_CHANNEL, 5, 33, (5, 33), (5, 1)),
        (INT8_CHANNEL, 5, 33, (5, 33), (5, 1)),
        (FP8_BLOCK, 128, 128, (128, 128), (1, 1)),
        (FP8_BLOCK, 129, 200, (129, 200), (2, 2)),
    ],
)
def test_shapes_of_one_matrix(
    fmt: WeightFormat, rows: int, columns: int, codes: tuple[int, int], scales: tuple[int, int]
) -> None:
    layout = WeightLayout(fmt, None, (("", rows),), columns)
    assert (layout.rows, layout.numel) == (rows, rows * columns)
    assert layout.shapes == (codes, scales)
    assert layout.maxima_shape == scales
    assert layout.nbytes == fmt.bytes(rows, columns)
    experts = WeightLayout(fmt, 7, (("w2", rows),), columns)
    assert experts.shapes == ((7, *codes), (7, *scales))
    assert (experts.numel, experts.nbytes) == (7 * layout.numel, 7 * layout.nbytes)


@pytest.mark.parametrize(
    ("fmt", "half", "scales"),
    [(MXFP4, 100, (200, 2)), (FP8_TENSOR, 100, (2, 1)), (FP8_CHANNEL, 100, (200, 1)), (FP8_BLOCK, 100, (2, 1)),
     (FP8_BLOCK, 128, (2, 1)), (FP8_BLOCK, 130, (4, 1))],
)  # fmt: skip
def test_every_shard_has_scales_of_its_own(fmt: WeightFormat, half: int, scales: tuple[int, int]) -> None:
    assert gate_up(fmt, half, 40).shapes[1] == scales


@pytest.mark.parametrize(
    ("layout", "follow"),
    [
        (gate_up(MXFP4, 5, 32), True),
        (gate_up(FP8_CHANNEL, 5, 32), True),
        (gate_up(FP8_TENSOR, 5, 32), False),
        (gate_up(FP8_BLOCK, 128, 32), True),
        (gate_up(FP8_BLOCK, 130, 32), False),
        (WeightLayout(FP8_BLOCK, None, (("", 130),), 32), True),
        (WeightLayout(FP8_TENSOR, None, (("", 130),), 32), True),
    ],
)
def test_whether_one_kernel_call_can_take_all_shards(layout: WeightLayout, follow: bool) -> None:
    assert layout.scales_follow_rows is follow


def test_shards_by_name() -> None:
    layout = WeightLayout(MXFP4, None, (("q", 24), ("k", 8), ("v", 8)), 64)
    assert [layout.shard_rows(name) for name in ("q", "k", "v", None)] == [(0, 24), (24, 32), (32, 40), (0, 40)]
    assert layout.shard_borders() == [0, 24, 32, 40]
    with pytest.raises(KeyError, match="no shard 'w1'; there are 'q', 'k', 'v'"):
        layout.shard_rows("w1")


def test_a_region_across_a_border_is_cut_there() -> None:
    layout = gate_up(FP8_BLOCK, 130, 200)
    first, second = layout.blocks(Region(None, (128, 134), (0, 200)))
    assert first.rows == (0, 2)
    assert first.index[0] == (slice(128, 130), slice(0, 200))
    assert first.index[1] == (slice(1, 2), slice(0, 2))
    assert first.whole  # the last, short block of gate
    assert second.rows == (2, 6)
    assert second.index[0] == (slice(130, 134), slice(0, 200))
    assert second.index[1] == (slice(2, 3), slice(0, 2))
    assert not second.whole  # four of the 128 rows of the first block of up
    assert not layout.whole(Region(None, (128, 134), (0, 200)))


@pytest.mark.parametrize(
    ("region", "codes", "scales"),
    [
        (Region(None, (1, 3), (0, 80)), (slice(1, 3), slice(0, 48)), (slice(1, 3), slice(0, 3))),
        (Region(None, (0, 4), (32, 64)), (slice(0, 4), slice(16, 32)), (slice(0, 4), slice(1, 2))),
        (Region(None, (0, 4), (64, 80)), (slice(0, 4), slice(32, 48)), (slice(0, 4), slice(2, 3))),
    ],
)
def test_the_padding_of_an_odd_k_belongs_to_the_last_columns(
    region: Region, codes: tuple[slice, slice], scales: tuple[slice, slice]
) -> None:
    (block,) = WeightLayout(MXFP4, None, (("", 4),), 80).blocks(region)
    assert (block.index, block.maxima, block.whole) == ((codes, scales), scales, True)


def test_padding_of_shards_and_columns() -> None:
    layout = WeightLayout(MXFP4, 2, (("w1", 100), ("w3", 100)), 90, (256, 256))
    assert (layout.rows, layout.columns, layout.numel) == (200, 90, 2 * 200 * 90)
    assert layout.shapes == ((2, 512, 128), (2, 512, 8))
    assert layout.nbytes == 2 * 512 * (128 + 8)
    gate, up = layout.shard_indices()
    assert gate.rows == slice(0, 100)
    assert gate.index == ((slice(0, 100), slice(0, 48)), (slice(0, 100), slice(0, 3)))
    assert up.rows == slice(100, 200)
    assert up.index == ((slice(256, 356), slice(0, 48)), (slice(256, 356), slice(0, 3)))
    assert layout.calls(padding=False) == (gate, up)
    padded = [[index[0] for index in part.index] for part in layout.calls(padding=True)]
    assert padded == [[slice(0, 256)] * 2, [slice(256, 512)] * 2]
    blocks = list(layout.blocks(Region(1, (98, 102), (64, 90))))
    assert [block.shard for block in blocks] == [0, 1]
    assert [block.index[0] for block in blocks] == [
        (slice(98, 100), slice(32, 48)),
        (slice(256, 258), slice(32, 48)),
    ]
    assert [block.rows for block in blocks] == [(0, 2), (2, 4)]
    assert all(block.whole for block in blocks)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*FORMATS.values()]),
    st.none() | st.integers(1, 2),
    st.lists(st.integers(1, 200), min_size=1, max_size=3),
    st.integers(1, 300),
    st.sampled_from([(1, 1), (32, 1), (1, 64), (64, 128), (256, 256)]),
)
def test_padding_is_what_the_parts_leave_over(
    fmt: WeightFormat, experts: int | None, shards: list[int], columns: int, multiples: tuple[int, int]
) -> None:
    layout = WeightLayout(fmt, experts, tuple((str(i), rows) for i, rows in enumerate(shards)), columns, multiples)
    codes, scales = torch.ones(layout.shapes[0]), torch.ones(layout.shapes[1])
    layout.clear_padding((codes, scales))
    for tensor, wanted, indices in (
        (codes, fmt.code_shape, [part.index[0] for part in layout.shard_indices()]),
        (scales, fmt.scale_shape, [part.index[1] for part in layout.shard_indices()]),
    ):
        assert tensor.sum() == (experts or 1) * sum(math.prod(wanted(rows, columns)) for rows in shards)
        for index, rows in zip(indices, shards, strict=True):
            assert tensor[..., *index].shape[-2:] == wanted(rows, columns)
            assert bool(tensor[..., *index].all())
    assert layout.is_padded or layout.nbytes == (experts or 1) * sum(fmt.bytes(rows, columns) for rows in shards)


@pytest.mark.parametrize(
    ("fmt", "columns", "aligned"),
    [
        (MXFP4, (0, 32), True),
        (MXFP4, (32, 80), True),
        (MXFP4, (0, 16), False),
        (MXFP4, (16, 80), False),
        (MXFP4, (1, 80), False),
        (FP8_CHANNEL, (1, 3), True),
        (FP8_BLOCK, (1, 3), True),
    ],
)
def test_packed_codes_begin_at_a_byte(fmt: WeightFormat, columns: tuple[int, int], aligned: bool) -> None:
    layout = WeightLayout(fmt, None, (("", 4),), 80)
    assert layout.code_aligned(Region(None, (0, 4), columns)) is aligned


def test_whole_says_whether_the_scales_depend_on_the_region_alone() -> None:
    per_row = WeightLayout(FP8_CHANNEL, None, (("", 8),), 64)
    assert per_row.whole(Region(None, (3, 4), (0, 64)))
    assert not per_row.whole(Region(None, (3, 4), (0, 32)))
    per_tensor = gate_up(FP8_TENSOR, 4, 64)
    assert per_tensor.whole(Region(None, (4, 8), (0, 64)))  # all of up
    assert not per_tensor.whole(Region(None, (4, 7), (0, 64)))
    assert not per_tensor.whole(Region(None, (3, 8), (0, 64)))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*FORMATS.values(), TINY]), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
def test_blocks_cover_a_region_once_and_whole_blocks_share_no_scale(
    fmt: WeightFormat, shards: list[int], data: st.DataObject
) -> None:
    columns = data.draw(st.integers(1, 80))
    layout = WeightLayout(fmt, None, tuple((f"s{i}", rows) for i, rows in enumerate(shards)), columns)
    top = data.draw(st.integers(0, layout.rows - 1))
    region = Region(None, (top, data.draw(st.integers(top + 1, layout.rows))), (0, columns))
    covered = torch.zeros(region.rows[1] - region.rows[0], dtype=torch.int)
    codes = torch.zeros(layout.shapes[0], dtype=torch.int)
    scales = torch.zeros(layout.shapes[1], dtype=torch.int)
    for block in layout.blocks(region):
        rows = block.rows[1] - block.rows[0]
        covered[slice(*block.rows)] += 1
        codes[block.index[0]] += 1
        scales[block.index[1]] += 1
        assert codes[block.index[0]].shape == fmt.code_shape(rows, columns)
        if block.whole:
            assert scales[block.index[1]].shape == fmt.scale_shape(rows, columns)
    assert (covered == 1).all()
    assert (codes[slice(*region.rows)] == 1).all()
    assert codes.sum() == codes[slice(*region.rows)].sum()
    assert scales.max() == 1
    if region.rows == (0, layout.rows):
        assert layout.whole(region)
        assert (scales == 1).all()
