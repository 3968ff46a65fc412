"""The search for scales and zero points of INT4 groups in vector IR (see `reference.integer_mse`).

What is tried of a batch of groups is made together, a group in each lane, and put into memory; the errors of a group
under one scale are then summed a vector of elements at a time, and what is best is chosen for the batch again. Errors
are float32 multiples of 1/32, whose squares add up exactly.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ...group_search import FACTORS, FURTHEST, LARGEST, SHIFTS, UNIT, ZERO_POINTS, searched_extreme
from ...scale_rules import SMALLEST_SCALE
from .integer import BATCH, MAGIC, rounded_scale, values_even_and_odd, widened_scale
from .vector import (
    F32,
    I32,
    I64,
    ITEM_BYTES,
    Accumulators,
    Codegen,
    Vector,
    accumulate_product,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    source_element,
    splat,
    store,
    store_scalar,
)

PAIRS = len(FACTORS) * len(ZERO_POINTS)
"""What is tried of a group."""
ROWS = 2 * len(FACTORS) + PAIRS
"""Rows of `BATCH` float32 that hold it: the scales, their inverses, and minus the zero points of each."""
FAR = 64.0
"""Zero points beyond it are the largest, whatever they are."""


def _row(b: ir.IRBuilder, base: ir.Value, row: int) -> ir.Value:
    """The address of a row of a batch."""
    return b.add(base, I64(4 * BATCH * row))


def _lowest_row(number: int, step: int) -> int:
    """The row of the zero points of a pair."""
    return 2 * len(FACTORS) + number * len(ZERO_POINTS) + step


@emitted
def try_scales(typing: Any, high: Any, low: Any, tried: Any, kind: Any, dtype: Any) -> tuple[Any, Codegen]:
    """Write what is tried of a batch whose extremes are at `high` and `low` to `tried`, float32 [ROWS, BATCH].

    `kind` is that of the weights, `dtype` that of the scales, both literal.
    """
    followed, scale_kind = searched_extreme(str(kind.literal_value)), str(dtype.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        above, below = (load(b, address, F32, BATCH).min(followed) for address in args[:2])
        whole = (above * 0.5 + below * 0.5) / (LARGEST / 2)
        for number, (factor, shift) in enumerate(zip(FACTORS, SHIFTS, strict=True)):
            bits = rounded_scale((whole * factor).max(SMALLEST_SCALE), scale_kind)
            scale = widened_scale(bits, scale_kind)
            store(scale, _row(b, args[2], number))
            store(constant(b, F32, BATCH, 1.0) / scale, _row(b, args[2], len(FACTORS) + number))
            lowest = (below / scale).min(FAR) - shift + MAGIC - MAGIC
            for step, more in enumerate(ZERO_POINTS):
                zero = (lowest + float(more)).max(0.0).min(float(LARGEST))
                store(constant(b, F32, BATCH, 0.0) - zero, _row(b, args[2], _lowest_row(number, step)))
        return context.get_dummy_value()

    return types.void(high, low, tried, kind, dtype), codegen


@emitted
def add_errors(
    typing: Any, source: Any, length: Any, groups: Any, tried: Any, sums: Any, lanes: Any, kind: Any
) -> tuple[Any, Codegen]:
    """Add squared errors of `groups` runs of `length` finite elements to `sums`, int32 [PAIRS, BATCH].

    `length` is a multiple of the literal `lanes`. Zeros have none under any scale.
    """
    settings = int(lanes.literal_value), str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, length, groups, tried, sums, _, _ = args
        run = b.mul(length, I64(ITEM_BYTES[settings[1]]))
        with count_to(b, groups) as group:
            start, lane = b.add(source, b.mul(group, run)), b.mul(group, I64(4))
            with count_to(b, I64(len(FACTORS))) as number:
                _add_errors_under(b, start, length, b.add(tried, lane), b.add(sums, lane), number, *settings)
        return context.get_dummy_value()

    return types.void(source, length, groups, tried, sums, lanes, kind), codegen


def _add_errors_under(
    b: ir.IRBuilder,
    start: ir.Value,
    length: ir.Value,
    tried: ir.Value,
    sums: ir.Value,
    number: ir.Value,
    lanes: int,
    kind: str,
) -> None:
    """Those of one group under one scale and its zero points."""
    acc, half, steps = Accumulators(b), lanes // 2, range(len(ZERO_POINTS))
    inverses = b.add(_row(b, tried, len(FACTORS)), b.mul(number, I64(4 * BATCH)))
    of_pairs = b.mul(number, I64(4 * BATCH * len(ZERO_POINTS)))
    zeros, sums = b.add(_row(b, tried, 2 * len(FACTORS)), of_pairs), b.add(sums, of_pairs)
    inverse = splat(b, load_scalar(b, inverses, F32), half)
    lowest = [splat(b, load_scalar(b, _row(b, zeros, step), F32), half) for step in steps]
    highest = [least + float(LARGEST) for least in lowest]
    for step in steps:
        acc.start(f"{step}", constant(b, F32, half, 0.0))
    with count_to(b, b.udiv(length, I64(lanes))) as i:
        at = b.add(start, b.mul(i, I64(lanes * ITEM_BYTES[kind])))
        for x in values_even_and_odd(load(b, at, source_element(kind), lanes), kind):
            y = (x * inverse).max(-FURTHEST).min(FURTHEST) + MAGIC * UNIT - MAGIC * UNIT
            whole = y + MAGIC - MAGIC
            for step in steps:
                error = y - whole.max(lowest[step]).min(highest[step])
                acc.update(f"{step}", lambda a, e=error: accumulate_product(e, e, a))  # type: ignore[misc]
    for step in steps:
        total = acc.get(f"{step}") * (1.0 / (UNIT * UNIT))
        counted = Vector(b, b.fptosi(total.value, ir.VectorType(I32, half))).reduce("add")
        place = _row(b, sums, step)
        store_scalar(b, b.add(load_scalar(b, place, I32), counted), place)


@emitted
def choose_words(typing: Any, tried: Any, sums: Any, words: Any, dtype: Any) -> tuple[Any, Codegen]:
    """Write the scales and zero points of the least errors of a batch, side by side, in the literal `dtype`."""
    scale_kind = str(dtype.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        tried, sums, words, _ = args
        first = load(b, tried, F32, BATCH)
        least = None
        for number in range(len(FACTORS)):
            scale = load(b, _row(b, tried, number), F32, BATCH)
            ratio = scale / first
            for step in range(len(ZERO_POINTS)):
                lowest = load(b, _row(b, tried, _lowest_row(number, step)), F32, BATCH)
                total = load(b, _row(b, sums, number * len(ZERO_POINTS) + step), I32, BATCH)
                error = total.to_float(F32) * (ratio * ratio)
                if least is None:
                    least, best, zero = error, scale, lowest
                    continue
                better = least.gt(error)
                least, best, zero = (
                    better.select(new, old) for new, old in ((error, least), (scale, best), (lowest, zero))
                )
        pairs = [lane for i in range(BATCH) for lane in (i, i + BATCH)]
        points = rounded_scale(constant(b, F32, BATCH, 0.0) - zero, scale_kind)
        store(rounded_scale(best, scale_kind).shuffle(pairs, points), words)
        return context.get_dummy_value()

    return types.void(tried, sums, words, dtype), codegen
