"""NaN and infinities in weights that keep their values: looked for in pieces while they are in cache, counted by name.

A float is finite where its magnitude, read as an integer, is below that of infinity; and so it stays finite in a
narrower type where it is below that of the first number that is rounded to infinity there. The largest of the bits as
signed integers is the largest positive number, as unsigned integers the largest negative one: two passes over what is
in cache, without a temporary, each as fast as a copy.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteWeightError
from ..geometry.layout import WeightLayout
from ..kernels.formats import Tensors
from ..kernels.statistics import AMAX

ADVICE = (
    "a model would compute with it: repair the checkpoint, or leave out --strict (strict=True) to load it all the same"
)

MAY_OVERFLOW = 2.0**15
"""The largest weight without a code that is infinite in float16: a code is less than twice its weight."""
TILE = 1 << 20
"""Elements that codes are read back to at once."""

_INTEGERS = {
    1: (torch.int8, np.uint8),
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}
_WITHOUT_INFINITY = {torch.float8_e4m3fn: 0x7F}
"""Types whose largest magnitude is NaN, with its bits."""
_NO_MAGNITUDE = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
"""Types whose NaN is not the largest magnitude."""
_FINITE = (torch.float4_e2m1fn_x2,)
"""Types without NaN and infinity, whose values torch may not be able to look at."""


@dataclass(slots=True)
class NonFinite:
    """What was found in one weight: how many elements, and the flat index of the first of them."""

    name: str
    shape: tuple[int, ...]
    nan: int = 0
    infinite: int = 0
    overflowed: int = 0
    """Finite in the checkpoint, infinite in the dtype of the model."""
    first: int = -1

    @property
    def index(self) -> list[int]:
        """Where the first is."""
        return [int(i) for i in np.unravel_index(self.first, self.shape)] if self.shape else []

    def error(self, position: tuple[int, int] | None = None) -> NonFiniteWeightError:
        """The error that names the first; `position` is where it is in the piece that held it."""
        error = NonFiniteWeightError(f"{self.name} is not finite at index {self.index}; {ADVICE}")
        error.position, error.advice = position, ADVICE
        return error


class NonFiniteValues:
    """What is found in one load, from any number of threads; with `strict`, the first is a `NonFiniteWeightError`."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._found: dict[str, NonFinite] = {}
        self._lock = threading.Lock()

    def found(self) -> list[NonFinite]:
        """All weights in which there was something, by name."""
        with self._lock:
            return [self._found[name] for name in sorted(self._found)]

    def look(
        self,
        name: str,
        shape: Sequence[int],
        values: Tensor,
        dtype: torch.dtype,
        *,
        first: int,
        pitch: int,
        masks: bool = False,
        piece: bool = True,
    ) -> None:
        """Look at `values` [rows, columns], a part of the weight `name` of a shape, before they become `dtype`.

        The element [r, c] is that of the flat index `first` + r * `pitch` + c. `masks`: minus infinity is a value like
        any other, as it is in buffers. `piece`: an error has its position in `values`, by which it can be found in the
        checkpoint.
        """
        if is_finite(values, dtype):
            return
        wide = values.double()
        nan, beyond = wide.isnan(), (wide.abs() >= first_infinite(dtype)) & ~(masks & (wide < 0))
        bad = nan | beyond
        count = int(bad.sum())
        if not count:
            return
        row, column = bad.nonzero()[0].tolist()
        infinite = beyond & wide.isinf()
        here = NonFinite(
            name,
            tuple(shape),
            nan=int(nan.sum()),
            infinite=int(infinite.sum()),
            overflowed=int((beyond & ~infinite).sum()),
            first=first + row * pitch + column,
        )
        if self.strict:
            raise here.error((row, column) if piece else None)
        self.add(here)

    def take_up(self, found: NonFinite) -> None:
        """Something was found in a weight by a run that this one goes on with."""
        if self.strict:
            raise found.error()
        self.add(found)

    def add(self, found: NonFinite) -> None:
        """Something was found in a part of a weight."""
        with self._lock:
            known = self._found.setdefault(found.name, found)
            if known is not found:
                known.nan += found.nan
                known.infinite += found.infinite
                known.overflowed += found.overflowed
                known.first = min(known.first, found.first)


def may_overflow(statistics: Tensor) -> bool:
    """Whether a code of a layer of which `statistics` were measured may be infinite in float16."""
    return float(statistics[AMAX]) > MAY_OVERFLOW


def look_at_codes(
    found: NonFiniteValues,
    name: str,
    layout: WeightLayout,
    tensors: Tensors,
    dequantize: Callable[[Tensors, Tensor], None],
    dtype: torch.dtype,
) -> None:
    """Look at what the canonical `tensors` of a parameter stand for in the dtype a model computes in, tile by tile."""
    shape = (layout.rows, layout.columns) if layout.experts is None else (layout.experts, layout.rows, layout.columns)
    block = layout.format.rows_in_common or 1
    step = max(block, TILE // max(layout.columns, 1) // block * block)
    for expert, part in itertools.product(range(layout.experts or 1), layout.shard_indices()):
        own = tuple(
            (each if layout.experts is None else each[expert])[index]
            for each, index in zip(tensors, part.index, strict=True)
        )
        height = part.rows.stop - part.rows.start
        for start in range(0, height, step):
            stop = min(start + step, height)
            tile = torch.empty(stop - start, layout.columns, dtype=torch.float32, device=own[0].device)
            rows = [each.rows(start, stop) for each in layout.format.tensors]
            dequantize(tuple(each[slice(*some)] for each, some in zip(own, rows, strict=True)), tile)
            first = (expert * layout.rows + part.rows.start + start) * layout.columns
            found.look(name, shape, tile, dtype, first=first, pitch=layout.columns, piece=False)


def is_finite(values: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values are finite, and stay so where they become `dtype`."""
    kind = values.dtype
    if not kind.is_floating_point or kind in _FINITE or not values.numel():
        return True
    if values.device.type != "cpu" or kind in _NO_MAGNITUDE:
        largest = float(torch.linalg.vector_norm(values if kind.itemsize > 1 else values.float(), float("inf")))
        return largest < first_infinite(dtype or kind)
    signed, unsigned = _INTEGERS[kind.itemsize]
    bits, limit = values.detach().view(signed).numpy(), _limit(kind, dtype or kind)
    return bool(bits.max() < limit) and bool(bits.view(unsigned).max() < limit + (1 << (8 * kind.itemsize - 1)))


def first_infinite(dtype: torch.dtype) -> float:
    """The smallest magnitude that is rounded to infinity in a dtype; itself infinite where there is nothing wider."""
    if not dtype.is_floating_point or dtype == torch.float64 or dtype.itemsize == 1:
        return float("inf")
    info = torch.finfo(dtype)
    _, exponent = math.frexp(info.max)
    return math.ldexp(1 - info.eps / 4, exponent)  # half of the last place above the largest number, a tie


@cache
def _limit(kind: torch.dtype, dtype: torch.dtype) -> int:
    """The smallest magnitude of `kind`, as an integer, that is NaN, infinite, or becomes so in `dtype`."""
    if kind in _WITHOUT_INFINITY:
        return _WITHOUT_INFINITY[kind]
    first = torch.tensor(min(first_infinite(kind), first_infinite(dtype)), dtype=torch.float64)
    rounded = first.to(kind)
    bits = int(rounded.view(_INTEGERS[kind.itemsize][0]))
    return bits + bool(rounded.double() < first)
