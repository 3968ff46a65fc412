"""Shapes, alignments and sizes of the formats."""

from __future__ import annotations

import pytest
from quantload.kernels.formats import FORMATS


@pytest.mark.parametrize(
    ("name", "shape", "codes", "scales", "size", "align"),
    [
        ("mxfp4", (3, 64), (3, 32), (3, 2), 102, (1, 32)),
        ("mxfp4", (3, 65), (3, 48), (3, 3), 153, (1, 32)),
        ("mxfp4", (3, 1), (3, 16), (3, 1), 51, (1, 32)),
        ("mxfp4_rows", (3, 65), (3, 48), (3, 7), 165, (1, None)),
        ("fp8_channel", (5, 7), (5, 7), (5, 1), 55, (1, None)),
        ("fp8_tensor", (5, 7), (5, 7), (1, 1), 39, (None, None)),
        ("fp8_block", (129, 128), (129, 128), (2, 1), 129 * 128 + 8, (128, 128)),
        ("int8_channel", (5, 7), (5, 7), (5, 1), 55, (1, None)),
        ("int4fp8_channel", (5, 7), (5, 4), (5, 2), 60, (1, None)),
        ("int4_group128_f16", (3, 300), (3, 150), (3, 6), 486, (1, 128)),
        ("int8_group0_f32", (3, 300), (3, 300), (3, 2), 924, (1, None)),
        ("nvfp4", (2, 40), (2, 20), (2, 3), 64, (1, 16)),
    ],
)
def test_layout(name, shape, codes, scales, size, align):
    fmt = FORMATS[name]
    assert fmt.code_shape(*shape) == codes
    assert fmt.scale_shape(*shape) == scales
    assert fmt.bytes(*shape) == size
    assert (fmt.row_align, fmt.col_align) == align


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
def test_where_the_scales_of_some_columns_stand(name, columns, scales):
    assert FORMATS[name].scale_columns(*columns, 100) == scales


def test_names_are_the_keys():
    assert all(fmt.name == name for name, fmt in FORMATS.items())
