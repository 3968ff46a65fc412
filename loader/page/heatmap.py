"""What each module lost, by where it stands in the model: a table whose cells are coloured."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .elements import Markup, element, joined
from .grouping import Group, Heatmap, heatmap
from .numbers import NOT_MEASURED, several, share

STEPS = (8.0, 12.0, 16.0, 20.0, 26.0, 34.0)
"""Decibels at which the colour changes, from class `q0` of the style sheet to `q6`: the same on every page. Weights as
they usually are have 18 to 22 dB with four bits, which is the middle, 31 with FP8 and 40 with INT8."""


def colour(sqnr: float) -> int:
    """The number of the class for an SQNR in decibels."""
    return bisect.bisect_right(STEPS, sqnr)


DIVERGENCE_STEPS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Nats a token at which the colour of a divergence changes, from class `q6` to `q0`. Of the demo model in four bits,
`bench/sensitivity.py` found 6e-4 to 3e-3 for the modules of one kind in a third of the layers."""


def divergence_colour(divergence: float) -> int:
    """The number of the class for a divergence in nats a token."""
    return len(DIVERGENCE_STEPS) - bisect.bisect_right(DIVERGENCE_STEPS, divergence)


def quality_map(report: Mapping[str, Any]) -> Markup:
    """The heatmaps of a report, with their legends and the line that says what the chosen cell is."""
    map = heatmap(report["layers"])
    measured = any(cell.lowest is not None for cell in map.cells.values())
    diverges = any(cell.divergence is not None for cell in map.cells.values())
    if not measured and not diverges:
        return element("p", "Nothing was measured: statistics were off, or the codes were copied as they are stored.")
    said = element("p", "Choose a cell, with a pointer or the arrow keys, to see what it is.", id="cell-said",
                   role="status", class_="said")  # fmt: skip
    parts = [said]
    if measured:
        labels = (f"< {STEPS[0]:.0f}", *(f"{step:.0f}+" for step in STEPS))
        parts = [_legend(labels, "Colours of the SQNR in decibels, the lowest first"), said,
                 _table(map, "SQNR in decibels by depth and module", "lowest", _cell)]  # fmt: skip
    if diverges:
        steps = (f"{1000 * step:g}" for step in reversed(DIVERGENCE_STEPS))
        labels = (*(f"{step}+" for step in steps), f"< {1000 * DIVERGENCE_STEPS[0]:g}")
        parts += [
            element("p", "How far the predictions move where one module alone is quantized, as it was measured:"),
            _legend(labels, "Colours of the divergence in thousandths of a nat a token, the largest first"),
            _table(map, "Divergence in thousandths of a nat a token by depth and module", "largest", _divergence_cell),
        ]
    return joined(parts)


def _table(map: Heatmap, caption: str, counts: str, cell: Callable[[Group | None], Markup]) -> Markup:
    head = element(
        "tr",
        element("th", "depth", scope="col"),
        *(element("th", element("span", _short(column)), scope="col", title=column) for column in map.columns),
    )
    rows = [
        element("tr", element("th", label, scope="row"),
                *(cell(map.cells.get((row, column))) for column in range(len(map.columns))))
        for row, label in enumerate(map.rows)
    ]  # fmt: skip
    if map.depths_a_row > 1:
        caption += f"; {map.depths_a_row} depths share a row, of which the {counts} counts"
    inner = element("table", element("caption", caption), element("thead", head), element("tbody", *rows))
    return element("div", inner, class_="scroll heatmap", tabindex="0", role="region", aria_label=caption)


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


def _divergence_cell(cell: Group | None) -> Markup:
    if cell is None:
        return element("td")
    if cell.divergence is None:
        return element("td", NOT_MEASURED, class_="qn", title=several(cell.layers, "module") + ", not measured")
    among = f", largest of {several(cell.layers, 'module')}" if cell.layers > 1 else ""
    schemes = ", ".join(sorted(cell.schemes))
    said = f"{cell.most_divergent}: {1000 * cell.divergence:.3g} thousandths of a nat a token{among}, {schemes}"
    return element("td", f"{1000 * cell.divergence:.2g}", class_=f"q{divergence_colour(cell.divergence)}", title=said)


def _legend(labels: Iterable[str], said: str) -> Markup:
    """The classes from `q0`, the worst, to `q6`."""
    steps = (element("li", label, class_=f"q{index}") for index, label in enumerate(labels))
    return element("ol", *steps, class_="legend", aria_label=said)


def _short(module: str) -> str:
    """The end of a module's path: `self_attn.q_proj` is `q_proj`, of experts the whole of it is left."""
    parts = [part for part in module.split(".") if part != "*"]
    return ".".join(parts[-2:]) if parts[-1] == "weight" or len(parts[-1]) < 4 else parts[-1]
