"""Scales of parameters that ranks divide: which need the maxima of all ranks, and blocks that no rank may cut."""

from __future__ import annotations

import math

from ..errors import PolicyError
from ..geometry.layout import WeightLayout
from ..geometry.shares import Share


def scales_span_ranks(name: str, layout: WeightLayout, share: Share, transposed: bool) -> bool:
    """Whether some scale of a parameter is that of elements that several ranks have.

    Raises `PolicyError` where ranks would divide a block whose scale cannot be made of their maxima.
    """
    axis = share.dim - (layout.experts is not None)
    if axis < 0:  # whole experts
        return False
    along_rows = axis == (1 if transposed else 0)
    fmt = layout.format
    if fmt.whole_rows and not along_rows:
        own = " and ".join(f"{low} to {high}" for low, high in share.intervals)
        raise PolicyError(  # no maxima of parts tell which of its multipliers has the least error over a row
            f"{name}: {fmt.name} chooses the scales of a row by the error of all of its {share.size} columns, and a "
            f"rank has {own} of them: leave the layer as stored with an ignore pattern, or give it another scheme"
        )
    blocks = [scale.block_rows if along_rows else scale.block_cols for scale in fmt.scales]
    step = math.lcm(*(block for block in blocks if block), 1 if along_rows else fmt.packed)
    _check_borders(name, layout, share, step, "rows" if along_rows else "columns")
    return not all(blocks)


def _check_borders(name: str, layout: WeightLayout, share: Share, step: int, what: str) -> None:
    """Raise `PolicyError` for a block of `step` rows or columns of which the rank has a part."""
    part = share.size // len(share.intervals)
    for low, high in share.intervals:
        for border in low % part, (high - 1) % part + 1:
            if border % step and border != part:
                raise PolicyError(
                    f"{name}: a rank has {what} {low} to {high} of {share.size}, and {step} of them share a scale in "
                    f"{layout.format.name}, so that the block at {border // step * step} would be divided: start fewer "
                    f"ranks, leave the layer as stored with an ignore pattern, or give it a scheme with smaller blocks"
                )
