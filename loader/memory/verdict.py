"""Whether what is planned fits into what the machine has, and which scheme would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import MemoryBudgetError
from .amounts import format_bytes
from .limits import MemoryLimit
from .planner import MemoryPlan

State = Literal["fits", "tight", "does not fit"]
"""`tight`: what is certain to be needed is there, but not all of the predicted peak, or not without swapping."""
_WORST_FIRST: tuple[State, ...] = "does not fit", "tight", "fits"


@dataclass(frozen=True)
class SchemePeak:
    """What the same load would take with another scheme, in bytes."""

    scheme: str
    final_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Need:
    """Bytes that a load takes of one kind of memory: as predicted, and of that what it is certain to take.

    `mapped` is certain where memory counts once it is mapped, `written` where it counts once it is written to.
    """

    peak: int
    mapped: int
    written: int

    def state(self, limit: MemoryLimit) -> State:
        """Whether a limit leaves so much."""
        if self.peak <= limit.available:
            return "fits"
        certain = self.mapped if limit.is_virtual else self.written
        return "tight" if certain <= limit.left else "does not fit"


@dataclass(frozen=True)
class Verdict:
    """Whether a load fits, and the limit that decided: the one it comes nearest to. `None`: none is known.

    `needed` are the predicted bytes that count against that limit. `others` are the other schemes from the smallest to
    the largest, where the load does not fit, and `smallest` is the first of them that does. `allowed` is what the
    caller allows it, where that is less than what is available.
    """

    state: State
    needed: int
    limit: MemoryLimit | None = None
    others: Sequence[SchemePeak] = ()
    smallest: SchemePeak | None = None
    allowed: int | None = None

    def within(self, allowed: int | None) -> Verdict:
        """The same where the caller allows so many bytes, which the load was compared with before."""
        if allowed is None or self.limit is None or not self.needed <= allowed < self.limit.available:
            return self
        return replace(self, allowed=allowed)

    def __str__(self) -> str:
        if self.limit is None:
            return f"needs {format_bytes(self.needed)}; what is available is not known"
        where = "" if self.limit.is_machine else f" ({self.limit})"
        if self.state == "fits" and self.allowed is not None:
            return (
                f"fits: {_of(self.needed, self.allowed)} that --max-memory allows; {_short(self.limit.available)} "
                f"available{where}"
            )
        if self.state == "fits":
            return f"fits: {_of(self.needed, self.limit.available)} available{where}"
        swap = f" and {_short(self.limit.swap)} of swap" if self.limit.swap else ""
        needed, available = _apart(self.needed, self.limit.available)
        said = f"{self.state}: needs {needed}, {available}{swap} available{where}"
        return f"{said}{self._advice()}" if self.state == "does not fit" else said

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        limit = self.limit
        return {
            "fits": self.state != "does not fit",
            "state": self.state,
            "message": str(self),
            "needed_bytes": self.needed,
            "available_bytes": None if limit is None else limit.available,
            "allowed_bytes": self.allowed,
            "swap_bytes": None if limit is None else limit.swap,
            "limited_by": None if limit is None else limit.name,
            "smallest_that_fits": None if self.smallest is None else self.smallest.scheme,
            "other_schemes": [
                {"scheme": each.scheme, "final_bytes": each.final_bytes, "peak_bytes": each.peak_bytes}
                for each in self.others
            ],
        }

    def check(self, what: str, force: bool) -> None:
        """Raise `MemoryBudgetError` where it does not fit, unless that is to be tried all the same."""
        if self.state == "does not fit" and not force:
            raise MemoryBudgetError(f"{what} {self}; --force (LoadOptions.force) tries it all the same")

    def _advice(self) -> str:
        if self.smallest is not None:
            return f"; smallest that does: {self.smallest.scheme} at {_short(self.smallest.peak_bytes)}"
        if not self.others:
            return ""
        least = self.others[0]
        return f"; no scheme does: the smallest, {least.scheme}, needs {_short(least.peak_bytes)}"


def judge(
    plan: MemoryPlan,
    limits: Iterable[MemoryLimit],
    device: MemoryLimit | None = None,
    others: Callable[[], Sequence[SchemePeak]] = tuple,
) -> Verdict:
    """The verdict about a plan. `device` is the memory of the GPU that the model goes to, if it goes to one.

    `others` says what other schemes would take; it is asked where the load does not fit.
    """
    limits = list(limits)
    found = _decisive(plan, limits, device)
    if found.state != "does not fit":
        return found
    schemes = sorted(others(), key=lambda each: each.peak_bytes)
    fitting = (each for each in schemes if _decisive(_changed(plan, each), limits, device).state != "does not fit")
    return replace(found, others=schemes, smallest=next(fitting, None))


def _changed(plan: MemoryPlan, scheme: SchemePeak) -> MemoryPlan:
    return replace(plan, final_bytes=scheme.final_bytes, peak_bytes=scheme.peak_bytes)


def _decisive(plan: MemoryPlan, limits: Iterable[MemoryLimit], device: MemoryLimit | None) -> Verdict:
    whole = Need(plan.peak_bytes, plan.final_bytes + plan.staging_bytes, plan.final_bytes)
    beside = Need(plan.staging_bytes + plan.slack_bytes, plan.staging_bytes, 0)
    together = Need(whole.peak + beside.peak, whole.mapped + beside.mapped, whole.written)
    judged = [(_needed_of(limit, device, whole, beside, together), limit) for limit in limits]
    if device is not None:
        judged.append((whole, device))
    if not judged:
        return Verdict("fits", whole.peak)
    need, limit = min(
        judged, key=lambda pair: (_WORST_FIRST.index(pair[0].state(pair[1])), pair[1].available - pair[0].peak)
    )
    return Verdict(need.state(limit), need.peak, limit)


def _needed_of(limit: MemoryLimit, device: MemoryLimit | None, whole: Need, beside: Need, together: Need) -> Need:
    """What a limit of the host has to hold: beside a GPU the arena; the model too where its memory is the machine's."""
    if device is None:
        return whole
    return together if device.is_shared and limit.is_machine else beside


def _of(needed: int, available: int) -> str:
    """Both, with the unit once where they have the same."""
    first, second = _apart(needed, available)
    number, unit = first.split()
    return f"{number if second.endswith(' ' + unit) else first} of {second}"


def _apart(first: int, second: int) -> tuple[str, str]:
    """Both with as many digits as tell them apart, if three do."""
    short = _short(first), _short(second)
    return short if short[0] != short[1] else (format_bytes(first), format_bytes(second))


def _short(size: int) -> str:
    number, unit = format_bytes(size).split()
    return f"{float(number):.1f} {unit}" if unit != "B" else f"{number} B"
