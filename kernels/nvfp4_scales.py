"""The numbers in the scale rules of NVFP4, without torch: processes that only compile kernels need them too.

`reference/nvfp4.py` says what they are used for, and gives their sources.
"""

from __future__ import annotations

import numpy as np

from .scale_rules import LARGEST_BF16

BLOCK = 16
"""Elements along K that share a scale."""
LARGEST = 6.0
"""Of the codes (E2M1)."""
LARGEST_SCALE = 448.0
"""Of the block scales (E4M3)."""
FOUR_OVER_SIX_SCALE = 256.0
"""The largest scale of a block that is spread over 6: the same block spread over 4 has half as much again."""
EMPTY_SCALE = 0.125
"""The scale of a block that would have none."""
SMALLEST_AMAX = 2.0**-126
LARGEST_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
SCALE_STEP = 2.0**-9
"""The smallest block scale above zero."""
AMAX_BITS = 12
"""Significant bits that the largest weight of a tensor has at most where it was BF16 or FP16."""


def tensor_scale(amax: float, whole: float) -> float:
    """scale_2 of a tensor whose largest weight is `amax`; `whole` is its `spread`. Both are float32."""
    top, largest = np.float32(min(amax, LARGEST_BF16)), np.float32(whole)
    with np.errstate(over="ignore"):
        multiplier = np.float32(1.0) / max(top, np.float32(SMALLEST_AMAX)) * largest
    return float(top / largest) if np.isfinite(multiplier) else 1.0


def spread(scale_mode: str) -> float:
    """The largest weight of a tensor over its tensor scale."""
    return LARGEST * (LARGEST_SCALE if scale_mode == "default" else FOUR_OVER_SIX_SCALE)
