"""The numbers in the scale rules of the formats, without torch: processes that only compile kernels need them too.

The modules of the formats say what they are used for, and give their sources.
"""

from __future__ import annotations

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

CANDIDATES = tuple(float(np.float32(2.0 ** (j / 16))) for j in range(16))
"""The multipliers of a row that `mxfp4_rows` tries, as float32 has them."""
