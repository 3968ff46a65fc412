"""The numbers in the scale rules of the formats, without torch: processes that only compile kernels need them too.

The modules of the formats say what they are used for, and give their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

FP8_LARGEST = 448.0
FP8_CHANNEL_MIN_SCALE = 1.0 / (448.0 * 512.0)
FP8_TENSOR_MIN_AMAX = 1e-12
FP8_BLOCK_MIN_AMAX = 1e-4

INT8_LARGEST = 127.0

SMALLEST_SCALE = 2.0**-24
"""Of the integer formats: the smallest float16 above zero. AutoAWQ's own limit is a range of 1e-5, eleven times that at
four bits."""
SYMMETRIC_LARGEST = 7.0
"""Largest distance of a code of `int4fp8_channel` from its zero point."""

LARGEST_BF16 = (2.0 - 2.0**-7) * 2.0**127
"""No codes stand for more than this, so that every value they are read back to is finite in BF16 and float32: where a
maximum is larger, scales are those of this one, and codes saturate."""
TOP_EXPONENT: Mapping[str, int] = MappingProxyType({"bf16": 127, "f16": 15, "f32": 127})
"""The exponent of the largest powers of two among weights of a kind."""

CANDIDATES = tuple(float(np.float32(2.0 ** (j / 16))) for j in range(16))
"""The multipliers of a row that `mxfp4_rows` tries, as float32 has them."""


def largest_extreme(kind: str) -> float:
    """The largest weight, and minus the smallest, that scales of groups with zero points follow.

    Zero points are whole, so what codes stand for reaches up to half a step of fifteen beyond a weight, and a little
    more where the scale is rounded: that is still finite in the type of the weights.
    """
    return (2.0 - 9 * 2.0**-6) * 2.0 ** TOP_EXPONENT[kind]
