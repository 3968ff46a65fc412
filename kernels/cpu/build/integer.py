"""Compile the numba kernels that quantize to integers with zero points.

The loop nest is rows, then batches of whole groups of a row, then vectors of `lanes` elements. A batch is gone through
twice while it is in the nearest cache: for the extremes of each group, from which scales and zero points of the whole
batch are made at once, and for the codes; in between once more for each scale that is tried, where they are `searched`.
`at` is the first column of the row that has no code yet, always a multiple of `group`. Elements behind the last whole
vector go through a padded copy, whose codes beyond them are thrown away and whose zeros are taken out of the
statistics. NaN and infinities show in the extremes: such a batch gets no codes, and the elements are counted in the
end.
"""

from __future__ import annotations

import numpy as np

from ...statistics import ZERO
from ..compiled import (
    FINGERPRINT,
    Compiled,
    KernelFunction,
    Recipe,
    jit,
    read_f32,
    read_f64,
    read_u8,
    write_f32,
    write_f64,
    write_u8,
)
from ..ir.integer import BATCH, FAR, group_extremes, quantize_groups, scales_of_extremes, split_words
from ..ir.integer_search import PAIRS, ROWS, add_errors, choose_words, try_scales
from ..ir.magnitude import count_above, magnitude_to_f32
from ..ir.vector import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE
from .scaled import OBSERVE, QUANTIZE, add_count_and_amax

RUN = 8192
"""Elements whose squares are summed in float32."""


def _quantize(bits: int, scale_kind: str, rule: str, lanes: int, kind: str, measure: bool) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite, far, word = np.float32(LARGEST_FINITE[kind]), np.float32(FAR), 2 * ITEM_BYTES[scale_kind]
    symmetric, searched = rule == "symmetric", rule == "searched"
    batch, run, levels, smallest = BATCH, RUN, (1 << bits) - 1, int(symmetric)
    rows_tried, pairs = ROWS, PAIRS

    def quantize(source, source_stride, codes, codes_stride, scales, scales_stride, rows, cols, known, out, _, group):  # type: ignore[no-untyped-def]
        len(fingerprint)
        extremes, steps = np.zeros((4, batch), np.float32), np.zeros((2, batch), np.float32)
        words, padded, coded = (
            np.zeros(batch * word, np.uint8),
            np.zeros(lanes * width, np.uint8),
            np.zeros(lanes, np.uint8),
        )
        high, low = np.int64(extremes.ctypes.data), np.int64(extremes.ctypes.data) + 4 * batch
        scale, zero = np.int64(steps.ctypes.data), np.int64(steps.ctypes.data) + 4 * batch
        tried, errors = np.zeros(rows_tried * batch, np.float32), np.zeros(pairs * batch, np.int32)
        tried_at, errors_at = np.int64(tried.ctypes.data), np.int64(errors.ctypes.data)
        word_at, pad, pad_codes = np.int64(words.ctypes.data), np.int64(padded.ctypes.data), np.int64(coded.ctypes.data)
        largest, padding = 0, 0
        for row in range(rows):
            s, c, e = source + row * source_stride, codes + row * codes_stride, scales + row * scales_stride
            at = 0
            while at < cols:
                left = min(group, cols - at)
                length, count = left // lanes * lanes, 1
                extra = left - length
                if left == group and extra == 0:
                    count = min(batch, (cols - at) // group)
                here = s + at * width
                found = group_extremes(here, length, count, high, low, lanes, kind)
                if extra:
                    padded[:] = 0
                    for i in range(extra * width):
                        padded[i] = read_u8(here + length * width + i)
                    more = group_extremes(pad, lanes, 1, high + 8 * batch, low + 8 * batch, lanes, kind)
                    found = max(found, more)
                    extremes[0, 0], extremes[1, 0] = (
                        max(extremes[0, 0], extremes[2, 0]),
                        max(extremes[1, 0], extremes[3, 0]),
                    )
                largest = max(largest, found)
                words_here = e + at // group * word
                if found < infinity:
                    if known == 0:
                        if searched:
                            errors[:] = 0
                            try_scales(high, low, tried_at, kind, scale_kind)
                            add_errors(here, length, count, tried_at, errors_at, lanes, kind)
                            if extra:
                                add_errors(pad, lanes, 1, tried_at, errors_at, lanes, kind)
                            choose_words(tried_at, errors_at, word_at, scale_kind)
                        else:
                            scales_of_extremes(high, low, word_at, levels, symmetric, kind, scale_kind)
                        for i in range(count * word):
                            write_u8(words_here + i, words[i])
                    else:
                        for i in range(count * word):
                            words[i] = read_u8(words_here + i)
                    split_words(word_at, scale, zero, scale_kind)
                    near = 1
                    for i in range(count):
                        if max(extremes[0, i], extremes[1, i]) > steps[0, i] * far:
                            near = 0
                    for part in range(0, length, run):
                        o = c + (at + part) * bits // 8
                        quantize_groups(
                            here + part * width,
                            o,
                            min(run, length - part),
                            count,
                            scale,
                            zero,
                            near,
                            lanes,
                            bits,
                            smallest,
                            kind,
                            measure,
                            out,
                        )
                    if extra:
                        quantize_groups(
                            pad, pad_codes, lanes, 1, scale, zero, near, lanes, bits, smallest, kind, measure, out
                        )
                        if bits == 4 and extra % 2:
                            coded[extra // 2] &= 15
                        for i in range((extra * bits + 7) // 8):
                            write_u8(c + (at + length) * bits // 8 + i, coded[i])
                        padding += lanes - extra
                at += count * left
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            write_f64(out + 8 * ZERO, read_f64(out + 8 * ZERO) - padding)
        return 0

    return jit(quantize, QUANTIZE)


def _observe(lanes: int, kind: str) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite = np.float32(LARGEST_FINITE[kind])

    def observe(source, source_stride, amax, amax_stride, rows, cols, _, group):  # type: ignore[no-untyped-def]
        len(fingerprint)
        found, padded = np.zeros(4, np.float32), np.zeros(lanes * width, np.uint8)
        high, pad = np.int64(found.ctypes.data), np.int64(padded.ctypes.data)
        largest = 0
        for row in range(rows):
            s, a = source + row * source_stride, amax + row * amax_stride
            for at in range(0, cols, group):
                left = min(group, cols - at)
                length, here = left // lanes * lanes, s + at * width
                padded[:] = 0
                for i in range((left - length) * width):
                    padded[i] = read_u8(here + length * width + i)
                largest = max(largest, group_extremes(here, length, 1, high, high + 4, lanes, kind))
                largest = max(largest, group_extremes(pad, lanes, 1, high + 8, high + 12, lanes, kind))
                for i in range(2):
                    known = a + at // group * 8 + i * 4
                    write_f32(known, max(read_f32(known), max(found[i], found[i + 2])))
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        return 0

    return jit(observe, OBSERVE)


quantize = Compiled(_quantize)
observe = Compiled(_observe)
