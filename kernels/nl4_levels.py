"""The numbers of NL4, without torch: processes that only compile kernels need them too.

`reference/nl4.py` says what they are used for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from .scale_rules import LARGEST_BF16, TOP_EXPONENT

BLOCK = 32
"""Elements along K that share a scale."""
LEVELS = (0, 9, 18, 29, 40, 53, 68, 87, -106, -87, -68, -53, -40, -29, -18, -9)
"""The level of each code, which is as an int4 would be: the levels rise with codes from -8 to 7.

Of least squared error in blocks of normal and of heavy-tailed weights whose scales are searched as here, rounded so
that even and odd ones alternate: then all borders between them lie halfway between integers.
"""
LONGEST = 106
"""The largest magnitude of a level; there is one, a negative one."""
THRESHOLDS = tuple((low + high - 1) // 2 for low, high in zip(sorted(LEVELS), sorted(LEVELS)[1:], strict=False))
"""The largest integer that is nearer to each level but the last than to the next one."""
FURTHEST = 127
"""No element of a block is further from zero than so many units of its scale, unless that is the largest there is."""
STEPS = (0, 1, 2, -1)
"""What is tried of scales, in this order: E4M3 codes away from the one that brings the largest element to -106.

More of them, and both signs, lowered the squared error by less than 0.5 %.
"""
MOST_RAISED = 2
"""How many codes the lowest one that is tried is raised at most to have the largest element within `FURTHEST`.

It is two only where the nearest code is 2, up to 2.5 * 106 = 265 units of code 1, which code 2 has 254 of.
"""
RECIPROCAL = 0.009433962404727936
"""float32 1 / `LONGEST`."""
ROW_EXPONENT = 14
"""How many powers of two the scale of a row is below that of its largest element."""
LEAST_ROW_EXPONENT = -112
"""Of the scales of rows, so that no value is subnormal."""
LARGEST_CODE = 0x7E
"""The largest E4M3 code: 448."""
CAPPED_CODE = 0x79
"""The largest one, 288, where -106 times another would not be finite."""
CAPPED_FROM: Mapping[str, int] = MappingProxyType({kind: top - ROW_EXPONENT for kind, top in TOP_EXPONENT.items()})
"""The exponent of the scale of a row from which on that is so, by the kind of weights."""


def row_scale(amax: float) -> float:
    """The scale of a row whose largest weight is `amax`, at least 0 and finite: a power of two."""
    exponent = math.frexp(min(amax, LARGEST_BF16))[1] - 1 if amax else LEAST_ROW_EXPONENT
    return math.ldexp(1.0, max(exponent - ROW_EXPONENT, LEAST_ROW_EXPONENT))
