"""What the charts of the page are drawn from: plain numbers, for the script in `assets/page.js`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .sections import byte_rows, memory_lines

LINES_IN_SIGHT = 5.0
"""A line higher than so many times the peak is named beside the chart: drawn, it would flatten the curve."""


def chart_data(report: Mapping[str, Any]) -> dict[str, Any]:
    """The data of every chart, by name."""
    return {"memory": memory(report), "bytes": sizes(report), "throughput": throughput(report)}


def memory(report: Mapping[str, Any]) -> dict[str, Any]:
    """Points in seconds and bytes; lines in bytes, those that are far above the curve apart."""
    return memory_chart(report, [(name, nbytes) for name, nbytes, _ in memory_lines(report)])


def memory_chart(measured: Mapping[str, Any], lines: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """That chart for what has a timeline, a peak and phases: a report, or what a load had done when it failed."""
    named = [{"name": name, "bytes": nbytes} for name, nbytes in lines]
    highest = LINES_IN_SIGHT * max(measured["peak_bytes"], 1)
    return {
        "points": [[point["seconds"], max(0, point["memory"])] for point in measured["timeline"]],
        "lines": [line for line in named if line["bytes"] <= highest],
        "above": [line for line in named if line["bytes"] > highest],
        "phases": phases(measured),
    }


def sizes(report: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes before and after, by what layers are."""
    rows = byte_rows(report)
    return {
        "names": [what if what == "kept" or not count else f"{what}, {scheme}" for what, scheme, count, _, _ in rows],
        "before": [row[3] for row in rows],
        "after": [row[4] for row in rows],
    }


def throughput(report: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes per second between two points of the timeline, as steps."""
    return {"points": list(_speeds(report["timeline"])), "phases": phases(report)}


def phases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each phase with its first and last second."""
    at, found = 0.0, []
    for phase in report["phases"]:
        found.append({"name": phase["name"], "from": at, "to": at + phase["seconds"]})
        at += phase["seconds"]
    return found


def _speeds(timeline: Sequence[Mapping[str, Any]]) -> Iterator[list[float]]:
    for before, after in pairwise(timeline):
        passed = after["seconds"] - before["seconds"]
        if passed > 0:
            speed = max(0, after["bytes_read"] - before["bytes_read"]) / passed
            yield [before["seconds"], speed]
            yield [after["seconds"], speed]
