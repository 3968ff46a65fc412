"""`quantload eval`: what schemes do to a model, measured on a text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..memory.amounts import format_bytes
from ..threads import settle_threads
from .failing import fails_as_json
from .groups import command_with_groups
from .load_options import LoadOptionsGroup, StreamOptions
from .model_options import PolicyOptions
from .options import Json, Model, PlanOptions
from .output import show_table, table_of_schemes
from .preparing import found_here, libraries_while_reading, sensitivity_measured

if TYPE_CHECKING:
    from ..fit.evaluating import Evaluated, Evaluation

COLUMNS = ("final", "peak", "perplexity", "change", "divergence", "same token", "seconds")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(PlanOptions):
    """What `eval` takes that others take, too."""

    quantization: Annotated[
        str,
        typer.Option(
            "--quantization",
            "-q",
            metavar="A,B,C",
            help="Schemes to measure; `quantload schemes` lists them.",
            show_default="only the reference",
        ),
    ] = ""
    stream: StreamOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`."""
        return (*super().groups(), self.stream)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `evaluate_schemes`. Raises `PolicyError`."""
        given = replace(self, quantization="auto", chosen=replace(self.chosen, policy_file=None))
        arguments = super(EvalOptions, given).arguments()
        del arguments["quantization"]
        schemes = [name.strip() for name in self.quantization.split(",")] if self.quantization else []
        file = self.chosen.policy_file
        policies = {} if file is None else {file.name: PolicyOptions(policy_file=file).policy()}
        return {**arguments, "schemes": schemes, "policies": policies}


@command_with_groups
@fails_as_json
def evaluate(
    *,
    model: Model = None,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text of what the model is for, in UTF-8, a few thousand tokens.")
    ],
    tokens: Annotated[
        int, typer.Option(metavar="NUMBER", help="Tokens to look at, in parts of 512 from all over the text.", min=64)
    ] = 4096,
    reference: Annotated[
        str,
        typer.Option(
            metavar="SCHEME",
            help="What divergence is measured from. none: the model as it is stored, which must fit into memory; where "
            "it does not, int8_per_channel is near.",
        ),
    ] = "none",
    chosen: EvalOptions,
    as_json: Json = False,
) -> None:
    """Measure perplexity and divergence of schemes on a text, one model in memory at a time."""
    chosen.logs.set_up()
    settle_threads(chosen.forward.threads)
    arguments = chosen.arguments()
    given = found_here(model, chosen.source)
    sensitivity_measured(model, chosen, arguments)
    with libraries_while_reading(given, "auto", arguments["options"]):
        from ..fit.evaluating import evaluate_schemes

    found = evaluate_schemes(
        *(given, text), reference=reference, tokens=tokens,
        progress=chosen.logs.progress(), **arguments,
    )  # fmt: skip
    show_table(found, as_json, lambda: (_table(found), _below(found)))


def _table(found: Evaluation) -> Table:
    table = table_of_schemes(COLUMNS)
    for each in (found.reference, *found.schemes):
        compared = ("-", "-", "-") if each is found.reference else _compared(each, found.reference)
        sizes = format_bytes(each.final_bytes), format_bytes(each.peak_bytes)
        table.add_row(each.name, *sizes, f"{each.perplexity:.3f}", *compared, f"{each.seconds:.1f}")
    return table


def _compared(each: Evaluated, reference: Evaluated) -> tuple[str, str, str]:
    change = f"{each.perplexity / reference.perplexity - 1:+.2%}"
    return change, f"{each.divergence:.5f} +- {each.divergence_error:.5f}", f"{each.same_token:.2%}"


def _below(found: Evaluation) -> tuple[str, ...]:
    """What the numbers mean."""
    return (
        f"{found.tokens:,} tokens in {found.windows} parts; divergence from {found.reference.name} in nats a token, "
        "with its standard error",
        "same token: how often both find the same one most likely; seconds: of the forwards",
    )
