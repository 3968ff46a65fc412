"""What each module lost, by where it stands in the model: a table whose cells are coloured."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

from .elements import Markup, element, joined
from .grouping import Group, heatmap
from .numbers import NOT_MEASURED, several, share

STEPS = (8.0, 12.0, 16.0, 20.0, 26.0, 34.0)
"""Decibels at which the colour changes, from class `q0` of the style sheet to `q6`: the same on every page. Weights as
they usually are have 18 to 22 dB with four bits, which is the middle, 31 with FP8 and 40 with INT8."""


def colour(sqnr: float) -> int:
    """The number of the class for an SQNR in decibels."""
    return bisect.bisect_right(STEPS, sqnr)


def quality_map(report: Mapping[str, Any]) -> Markup:
    """The heatmap of a report, with its legend and the line that says what the chosen cell is."""
    map = heatmap(report["layers"])
    if all(cell.lowest is None for cell in map.cells.values()):
        return element("p", "Nothing was measured: statistics were off, or the codes were copied as they are stored.")
    head = element(
        "tr",
        element("th", "depth", scope="col"),
        *(element("th", element("span", _short(column)), scope="col", title=column) for column in map.columns),
    )
    rows = [
        element("tr", element("th", label, scope="row"),
                *(_cell(map.cells.get((row, column))) for column in range(len(map.columns))))
        for row, label in enumerate(map.rows)
    ]  # fmt: skip
    caption = "SQNR in decibels by depth and module" + (
        f"; {map.depths_a_row} depths share a row, of which the lowest counts" if map.depths_a_row > 1 else ""
    )
    inner = element("table", element("caption", caption), element("thead", head), element("tbody", *rows))
    return joined(
        [
            _legend(),
            element("p", "Choose a cell, with a pointer or the arrow keys, to see what it is.", id="cell-said",
                    role="status", class_="said"),
            element("div", inner, class_="scroll heatmap", tabindex="0", role="region", aria_label=caption),
        ]
    )  # fmt: skip


def _cell(cell: Group | None) -> Markup:
    if cell is None:
        return element("td")
    if cell.lowest is None:
        return element("td", NOT_MEASURED, class_="qn", title=several(cell.layers, "module") + ", not measured")
    among = f"lowest of {several(cell.layers, 'module')}, mean {cell.mean:.1f} dB; " if cell.layers > 1 else ""
    said = (
        f"{cell.worst}: {cell.lowest:.1f} dB, {among}{share(cell.saturated)} at the largest code, {share(cell.zero)} "
        f"zero, {', '.join(sorted(cell.schemes))}"
    )
    return element("td", f"{cell.lowest:.1f}", class_=f"q{colour(cell.lowest)}", title=said)


def _legend() -> Markup:
    labels = (f"< {STEPS[0]:.0f}", *(f"{step:.0f}+" for step in STEPS))
    steps = (element("li", label, class_=f"q{index}") for index, label in enumerate(labels))
    return element("ol", *steps, class_="legend", aria_label="Colours of the SQNR in decibels, the lowest first")


def _short(module: str) -> str:
    """The end of a module's path: `self_attn.q_proj` is `q_proj`, of experts the whole of it is left."""
    parts = [part for part in module.split(".") if part != "*"]
    return ".".join(parts[-2:]) if parts[-1] == "weight" or len(parts[-1]) < 4 else parts[-1]
