"""The numbers of the search for scales and zero points of INT4 groups, without torch: processes that only compile
kernels need them too.

`reference/integer_mse.py` says what they are used for.
"""

from __future__ import annotations

import numpy as np

from .scale_rules import TOP_EXPONENT

LARGEST = 15
"""The largest code."""
FACTORS = tuple(1.0 - 3 * i / 128 for i in range(8))
"""What the scale from the smallest to the largest weight is multiplied by, in the order in which it is tried.

Twice as many, down to 0.75, and four zero points of each, lowered the squared error by 0.1 %.
"""
SHIFTS = tuple(float(np.float32(LARGEST / 2) / np.float32(factor) - np.float32(7.0)) for factor in FACTORS)
"""How much lower than that of the whole range a zero point is that cuts off as much above as below, and half a step, in
float32: that and the next one are tried."""
ZERO_POINTS = (0, 1)
"""What is added to the lower one."""
UNIT = 2.0**-5
"""Errors are counted in parts of a step: sums of their squares are whole, and the same in whatever order."""
FURTHEST = 32.0
"""No weight counts as further from zero, in steps: squares of a group of 256 stay within 2^28."""


def searched_extreme(kind: str) -> float:
    """The largest weight, and minus the smallest, that scales which are searched follow, of weights of a kind.

    Codes may reach a whole step beyond it, a fifteenth of the range: that is still finite in BF16 and float16.
    """
    return 1.75 * 2.0 ** TOP_EXPONENT[kind]
