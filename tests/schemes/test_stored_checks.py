"""What is refused among the tensors of a stored weight, wherever the tensors lie."""

from __future__ import annotations

import pytest
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError, NonFiniteWeightError
from quantload.kernels.formats import FORMATS
from quantload.schemes.stored.checks import check_finite, check_order, check_shape
from quantload.schemes.stored.weights import StoredTensor, StoredWeight


def test_the_order_of_columns_is_checked_where_the_tensor_lies() -> None:
    groups = torch.arange(8, dtype=torch.int32) // 4
    with torch.device("meta"):  # whatever is made without a device of its own cannot be compared
        check_order("q.g_idx", groups.expand(2, 8), 4)
        with pytest.raises(CheckpointError, match=r"q\.g_idx does not count groups of 4 columns"):
            check_order("q.g_idx", groups.flip(0), 4)


def test_scales_in_fp8_are_looked_at_as_others_are() -> None:
    scales = torch.tensor([[448.0, 2.0**-9]]).to(torch.float8_e4m3fn)
    check_finite("q.weight_scale", scales)
    with pytest.raises(NonFiniteWeightError, match=r"q\.weight_scale: a scale is 448; with one above 100 codes"):
        check_finite("q.weight_scale", scales, 100.0)
    scales.view(torch.uint8)[0, 1] = 0x7F
    with pytest.raises(NonFiniteWeightError, match=r"q\.weight_scale: a scale is NaN or infinite"):
        check_finite("q.weight_scale", scales)


def test_multipliers_of_rows_are_part_of_their_scales() -> None:
    multiplier = torch.tensor([[1.5], [1.25]])
    scales = torch.cat((torch.tensor([[127, 130, 0], [1, 2, 3]]).to(torch.uint8), multiplier.view(torch.uint8)), 1)
    check_finite("q.weight_scale", scales, 12.0, beside=4)
    check_finite("q.weight_scale", scales[1:, 1:], 12.0, beside=4)  # which begins anywhere
    with pytest.raises(NonFiniteWeightError, match=r"q\.weight_scale: a scale is 12; with one above 11\.5 codes"):
        check_finite("q.weight_scale", scales, 11.5, beside=4)
    for column, value in ((1, 0xFF), (6, 0x7F)):
        damaged = scales.clone()
        damaged[0, column] = value
        damaged[0, 5] |= 0x80  # with the last byte the exponent of what is no number
        with pytest.raises(NonFiniteWeightError, match=r"q\.weight_scale: a scale is NaN or infinite"):
            check_finite("q.weight_scale", damaged, beside=4)


def test_a_shape_is_that_of_codes_and_scales() -> None:
    codes = StoredTensor("codes", TensorEntry("q.weight_packed", torch.int32, (8, 8), 0, 0, 256))
    weight = StoredWeight("q.weight", FORMATS["int4_group32_f16"], None, 8, 64, torch.float16, (codes,))
    with torch.device("meta"):
        check_shape("q.weight_shape", torch.tensor([[8, 64], [8, 64]], device="cpu"), weight)
        message = r"q\.weight_shape says \[8, 62\], but q\.weight_packed and its scales are .* of \[8, 64\]"
        with pytest.raises(CheckpointError, match=message):
            check_shape("q.weight_shape", torch.tensor([[8, 64], [8, 62]], device="cpu"), weight)
