"""`quantload compare`: what one could choose for a model, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..memory.amounts import format_bytes
from .failing import fails_as_json
from .groups import command_with_groups
from .model_options import PolicyOptions, SourceOptions
from .options import Device, Json, LogOptions, Model
from .output import show_table, table_of_schemes
from .preparing import found_here, libraries

if TYPE_CHECKING:
    from ..fit.comparing import Comparison

COLUMNS = ("final", "peak", "error", "expected loss", "--fit at that peak")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `compare` takes that others take, too."""

    device: Device = "auto"
    chosen: PolicyOptions
    source: SourceOptions
    logs: LogOptions


@command_with_groups
@fails_as_json
def compare(
    *,
    model: Model = None,
    schemes: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Schemes to compare.", show_default="all that can be loaded")
    ] = None,
    chosen: CompareOptions,
    as_json: Json = False,
) -> None:
    """Say what each scheme would take and is expected to lose, from the headers and a few weights."""
    chosen.logs.set_up()
    names = [] if schemes is None else [name.strip() for name in schemes.split(",")]
    given = found_here(model, chosen.source)
    with libraries():
        from ..fit.comparing import compare_schemes

    found = compare_schemes(
        *(given, names), device=chosen.device, policy=chosen.chosen.policy(),
        **chosen.source.values(),
    )  # fmt: skip
    show_table(found, as_json, lambda: (_table(found), _below(found)))


def _table(found: Comparison) -> Table:
    table = table_of_schemes(COLUMNS)
    for each in found.schemes:
        fit = "-" if each.fit_loss is None else f"{each.fit_loss:.1e}: {_modules(each.fit_schemes or {})}"
        sizes = format_bytes(each.final_bytes), format_bytes(each.peak_bytes)
        table.add_row(each.scheme, *sizes, f"{each.error:.1e}", f"{each.expected_loss:.1e}", fit)
    return table


def _modules(schemes: Any) -> str:
    return ", ".join(f"{count} {scheme}" for scheme, count in schemes.items())


def _below(found: Comparison) -> tuple[str, ...]:
    """What the numbers mean."""
    others = "" if found.sampled > 0.999 else ", others have that of the demo model"
    return (
        f"error: relative squared error of weights; {found.sampled:.0%} of them are of a kind of which some were "
        f"read{others}",
        "expected loss: divergence of the output in nats a token, a rule of thumb (docs/schemes.md)",
    )
