"""NaN and infinities in values that are kept: told from finite numbers by their bits, counted, and found again."""

from __future__ import annotations

import math

import pytest
import torch
from quantload.checkpoint.headers import DTYPES
from quantload.errors import NonFiniteWeightError
from quantload.geometry.regions import Region
from quantload.online.non_finite import NonFiniteValues, is_finite
from quantload.online.storage import FinalStorage
from quantload.online.weight_loader import DirectWeightLoader
from torch import Tensor, nn

WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TYPES = (*WIDE, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def some_of_each_kind(dtype: torch.dtype) -> Tensor:
    """Every number of a type of up to 16 bits; of a wider one, those around the ends of all types."""
    size = dtype.itemsize
    if size <= 2:
        half = 1 << (8 * size - 1)
        return torch.arange(-half, half).to(INTEGERS[size]).view(dtype)
    near_ends = [torch.finfo(each).max * factor for each in WIDE[:3] for factor in (1.0, 1 + torch.finfo(each).eps / 4)]
    ends = torch.tensor([0.0, 1.0, math.inf, math.nan, torch.finfo(dtype).max, *near_ends], dtype=torch.float64).to(
        dtype
    )
    bits = ends.view(INTEGERS[size])
    near = torch.cat([(bits + step).view(dtype) for step in range(-2, 3)])
    return torch.cat((near, -near))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("wanted", WIDE, ids=str)
def test_what_is_finite_in_the_end_is_told_from_the_bits(dtype: torch.dtype, wanted: torch.dtype) -> None:
    values = some_of_each_kind(dtype)
    stays = torch.isfinite(values.to(torch.float64).to(wanted)) & torch.isfinite(values.to(torch.float64))
    finite, other = values[stays], values[~stays]
    assert len(finite)
    assert is_finite(finite.view(1, -1), wanted)
    for value in other[:: max(1, len(other) // 64)]:
        assert not is_finite(value.view(1, 1), wanted)
        for place in (0, len(finite) // 2, len(finite) - 1):
            changed = finite.clone()
            changed[place] = value
            assert not is_finite(changed.view(1, -1), wanted), value


def test_columns_of_a_matrix_are_looked_at_without_their_neighbours() -> None:
    values = torch.zeros(8, 8)
    values[:, 5] = math.nan
    assert is_finite(values[:, :5])
    assert not is_finite(values[:, 5:6])
    assert is_finite(values.T[6:])
    assert is_finite(values[:0])
    assert is_finite(torch.zeros(2, 2, dtype=torch.int64))


def whole_rows(*intervals: tuple[int, int]) -> list[Region]:
    return [Region(None, interval, (0, 8)) for interval in intervals]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 8, device="meta"))
        self.register_buffer("mask", torch.empty(6, 8, device="meta"))


def loader(name: str, found: NonFiniteValues, dtype: torch.dtype = torch.float32) -> tuple[Layer, DirectWeightLoader]:
    layer = Layer()
    return layer, DirectWeightLoader(layer, name, name, dtype, FinalStorage(torch.device("cpu")), found)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_zeros_of_every_dtype_a_checkpoint_may_hold_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.zeros(1, 16, dtype=torch.uint8).view(dtype), dtype)


def test_everything_in_a_weight_is_counted_and_the_first_is_named() -> None:
    values = torch.ones(6, 8)
    values[5, 7], values[2, 3], values[4, 0], values[4, 1] = math.nan, math.inf, -math.inf, 1e9
    found = NonFiniteValues()
    _layer, direct = loader("weight", found, torch.float16)
    for region in whole_rows((4, 6), (0, 2), (2, 4)):
        direct.load_region(values[slice(*region.rows)], region)
    (weight,) = found.found()
    assert (weight.nan, weight.infinite, weight.overflowed, weight.index) == (1, 2, 1, [2, 3])


def test_a_read_into_place_is_looked_at_when_it_has_arrived() -> None:
    found = NonFiniteValues()
    _layer, direct = loader("weight", found)
    (region,) = whole_rows((2, 6))
    place = direct.in_place(torch.float32, region)
    assert place is not None
    values = torch.ones(4, 8)
    values[3, 1] = math.nan
    place.target().copy_(values.view(-1).view(torch.uint8))
    place.arrived()
    assert [weight.index for weight in found.found()] == [[5, 1]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e9])
def test_minus_infinity_in_a_buffer_is_a_mask(value: float) -> None:
    found = NonFiniteValues(strict=True)
    _layer, direct = loader("mask", found, torch.float16)
    (region,) = whole_rows((0, 6))
    values = torch.zeros(6, 8)
    values[0, 4:] = value
    if value < 0:
        direct.load_region(values, region)
        assert found.found() == []
    else:
        with pytest.raises(NonFiniteWeightError, match=r"mask is not finite at index \[0, 4\]"):
            direct.load_region(values, region)


def test_strict_refuses_a_parameter_with_minus_infinity() -> None:
    _layer, direct = loader("weight", NonFiniteValues(strict=True))
    (region,) = whole_rows((2, 6))
    values = torch.zeros(4, 8)
    values[1, 6] = -math.inf
    with pytest.raises(NonFiniteWeightError, match=r"weight is not finite at index \[3, 6\]; .*--strict") as caught:
        direct.load_region(values, region)
    assert caught.value.position == (1, 6)
