"""Shapes, alignments and sizes of the formats."""

from __future__ import annotations

import pytest
from quantload.kernels.formats import FORMATS


@pytest.mark.parametrize(
    ("name", "shape", "codes", "scales", "size"),
    [
        ("mxfp4", (3, 64), (3, 32), (3, 2), 102),
        ("mxfp4", (3, 65), (3, 48), (3, 3), 153),
        ("mxfp4", (3, 1), (3, 16), (3, 1), 51),
        ("mxfp4_rows", (3, 65), (3, 48), (3, 7), 165),
        ("fp8_channel", (5, 7), (5, 7), (5, 1), 55),
        ("fp8_tensor", (5, 7), (5, 7), (1, 1), 39),
        ("fp8_block", (129, 128), (129, 128), (2, 1), 129 * 128 + 8),
        ("int8_channel", (5, 7), (5, 7), (5, 1), 55),
        ("int4fp8_channel", (5, 7), (5, 4), (5, 2), 60),
        ("int4_group128_f16", (3, 300), (3, 150), (3, 6), 486),
        ("int8_group0_f32", (3, 300), (3, 300), (3, 2), 924),
    ],
)
def test_layout(name: str, shape: tuple[int, int], codes: tuple[int, int], scales: tuple[int, int], size: int) -> None:
    fmt = FORMATS[name]
    assert fmt.code_shape(*shape) == codes
    assert fmt.scale_shape(*shape) == scales
    assert fmt.bytes(*shape) == size
    assert tuple(each.shape(*shape) for each in fmt.tensors) == (codes, scales)
    assert fmt.amax_shape(*shape) == scales


def test_a_scale_of_the_tensor_is_one_more_and_its_maximum_is_all_there_is() -> None:
    fmt = FORMATS["nvfp4"]
    assert fmt.names("w") == ["w", "w_scale", "w_scale_2"]
    assert fmt.shapes(2, 40) == ((2, 24), (2, 3), (1, 1))
    assert fmt.amax_shape(2, 40) == (1, 1)
    assert fmt.bytes(2, 40) == 48 + 6 + 4


def test_scales_of_rows_stand_beside_those_of_blocks() -> None:
    fmt = FORMATS["nl4"]
    assert fmt.names("w") == ["w", "w_scale", "w_scale_2"]
    assert fmt.shapes(2, 40) == ((2, 32), (2, 2), (2, 1))
    assert fmt.amax_shape(2, 40) == (2, 1)
    assert fmt.bytes(2, 40) == 64 + 4 + 8
    assert not fmt.joins_rows(64)
    assert FORMATS["nvfp4"].joins_rows(64) is FORMATS["mxfp4_rows"].joins_rows(64) is False
    assert [FORMATS["mxfp4"].joins_rows(cols) for cols in (64, 65)] == [True, False]


@pytest.mark.parametrize(
    ("name", "columns", "scales"),
    [
        ("mxfp4", (64, 100), slice(2, 4)),
        ("mxfp4_rows", (0, 100), slice(0, 8)),
        ("int4_group32_f16", (32, 64), slice(2, 4)),
        ("int8_group0_f32", (0, 100), slice(0, 2)),
        ("fp8_tensor", (50, 100), slice(0, 1)),
    ],
)
def test_where_the_scales_of_some_columns_stand(name: str, columns: tuple[int, int], scales: slice) -> None:
    assert FORMATS[name].scales[0].columns(*columns, 100) == scales


def test_names_are_the_keys() -> None:
    assert all(fmt.name == name for name, fmt in FORMATS.items())
