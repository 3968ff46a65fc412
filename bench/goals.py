"""A goal of a benchmark, whether it was met, and by how far not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One goal on one checkpoint, shape or machine. `met` is None when a run lacks what it takes to tell."""

    name: str
    checkpoint: str
    met: bool | None
    reached: str


def at_least(name: str, subject: str, value: float | None, goal: float, unit: str) -> Goal:
    """A goal that is met from `goal` on; says by what share of it a smaller value falls short."""
    if value is None:
        return Goal(name, subject, None, "not measured")
    met = value >= goal
    return Goal(name, subject, met, f"{value:.2f}{unit}" + ("" if met else f", {1 - value / goal:.1%} short"))


def at_most(name: str, subject: str, value: float | None, goal: float, unit: str) -> Goal:
    """A goal that is met up to `goal`; says by what share of it a larger value is over."""
    if value is None:
        return Goal(name, subject, None, "not measured")
    met = value <= goal
    return Goal(name, subject, met, f"{value:.2f}{unit}" + ("" if met else f", {value / goal - 1:.1%} over"))


def columns(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Plain text columns: the first left, the others right aligned."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = []
    for line in (header, ["-" * width for width in widths], *rows):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def print_goals(goals: Sequence[Goal]) -> None:
    """The goals, met or by how far not."""
    words = {True: "met", False: "NOT met", None: "unknown"}
    print("\nGoals")
    print(columns([[g.name, g.checkpoint, words[g.met], g.reached] for g in goals], ("goal", "on", "", "reached")))
    met = sum(goal.met is True for goal in goals)
    print(f"{met} of {len(goals)} met, {sum(goal.met is None for goal in goals)} unknown")
