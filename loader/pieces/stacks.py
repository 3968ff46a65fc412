"""Matrices of several experts that stand one after the other: one strided view of a buffer, one call of a closure."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub

from ..geometry.regions import Region


class Stack:
    """The same rows and columns of `count` experts, `step` apart in the parameter.

    In each buffer they come from, the first begins at one of `offsets` and the others follow in one of `pitches`, both
    in whatever unit the owner counts. `expert` is the first one, `None` for a parameter without experts.
    """

    __slots__ = ("columns", "count", "expert", "offsets", "parameter", "pitches", "rows", "step")

    def __init__(self, parameter: str, region: Region, offsets: tuple[int, ...]) -> None:
        self.parameter = parameter
        self.expert, self.rows, self.columns = region
        self.offsets = offsets
        self.count, self.step = 1, 0
        self.pitches: tuple[int, ...] = (0,) * len(offsets)

    @property
    def region(self) -> Region:
        """The first matrix."""
        return Region(self.expert, self.rows, self.columns)

    @property
    def experts(self) -> Sequence[int | None]:
        """All experts, in the order of their matrices."""
        if self.expert is None:
            return (None,)
        step = self.step or 1
        return range(self.expert, self.expert + self.count * step, step)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def takes(self, expert: int | None, offsets: tuple[int, ...]) -> bool:
        """Put another matrix of the same rows and columns at the end, if it stands where the next one would."""
        if self.expert is None or expert is None or expert <= self.expert:
            return False
        step, pitches, count = expert - self.expert, tuple(map(sub, offsets, self.offsets)), self.count
        if count == 1:
            self.step, self.pitches = step, pitches
        elif step != count * self.step or pitches != tuple([count * pitch for pitch in self.pitches]):
            return False
        self.count = count + 1
        return True
