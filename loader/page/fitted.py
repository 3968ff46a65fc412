"""What `--fit` chose, where schemes were chosen for a size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .elements import Markup, element, prose, table
from .numbers import size
from .sections import section


def fitted(report: Mapping[str, Any]) -> Markup:
    """Which schemes were chosen for which modules, for what size, and what they are expected to lose."""
    fit = report.get("fit")
    if fit is None:
        return Markup("")
    rows = [
        (_where(row), row["scheme"], f"{row['modules']:,}", size(row["bytes"]), f"{row['share_of_loss']:.0%}")
        for row in fit["rows"]
    ]
    said = (
        f"Of all schemes those were chosen that are expected to lose least while {fit['of']} stays below "
        f"{size(fit['size'], 4)}: it is planned to take {size(fit['planned_bytes'], 4)}, and to move the predictions "
        f"by {1000 * fit['expected_loss']:.3g} thousandths of a nat a token. That is an expectation; "
        "`quantload eval` measures."
    )
    head = ("modules by depth", "scheme", "modules", "size", "loss")
    shown = table(
        "Schemes by kind of module and third of the layers, with their share of the expected loss", head, rows, left=2
    )
    return section("What was chosen to fit", element("p", prose(said)), shown, name="fit")


def _where(row: Mapping[str, Any]) -> str:
    """A kind of module, and where it stands; the head and the embedding are in no third of the layers."""
    return f"{row['kind']}, {row['third']} third" if row["third"] else str(row["kind"])
