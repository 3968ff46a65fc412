"""The load report as tables for a terminal."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .amounts import GIB, format_bytes
from .planner import MemoryPlan
from .report import KeptReport, LayerReport, LoadReport, NonFiniteReport

WORST_LAYERS = 5
NAMES_PER_REASON = 3


def render(report: LoadReport, console: Console | None = None) -> None:
    """Print schemes, worst layers, what was kept, memory and speed; `console` defaults to standard error."""
    console = console or Console(stderr=True)
    console.print(Text(f"{report.model} as {report.quantization} on {report.device}", style="bold"))
    if report.layers:
        console.print(_schemes(report.layers))
    worst = _worst(report.layers)
    if worst:
        console.print(_worst_layers(worst))
        left_out = len(report.layers) - len(worst)
        if left_out > 0:
            console.print(f"{left_out} more layers: --report FILE has all of them, --html FILE a map", highlight=False)
    if report.kept:
        console.print(_kept(report.kept))
    for line in _left(report.to_dict()):
        console.print(line, highlight=False, markup=False)
    console.print(_memory(report))
    conversions = f", fallback conversions: {report.fallback_conversions}" if report.fallback_conversions else ""
    cache = f", cache: {report.cache}" if report.cache is not None else ""
    if report.digest is not None:
        console.print(f"digest {report.digest}, in {report.digest_seconds or 0.0:.1f} s", highlight=False)
    console.print(
        f"read {format_bytes(report.bytes_read)} in {report.seconds:.1f} s"
        f" ({report.bytes_per_second / GIB:.2f} GiB/s){conversions}{cache}",
        highlight=False,
    )
    if report.source_bytes is not None:
        console.print(_source(report), highlight=False, markup=False)
    for line in _written(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _source(report: LoadReport) -> str:
    """What was asked of a server."""
    results = ", ".join(f"{each.count:,} {each.result}" for each in report.source_requests)
    return (
        f"fetched {format_bytes(report.source_bytes or 0)} over {report.source_connections} connections, requests: "
        f"{results}; {report.source_retries:,} tried again"
    )


def _written(report: LoadReport) -> Iterator[str]:
    """Where the result of a conversion is, how large, and what reads it."""
    if report.output is None or report.output_bytes is None:
        return
    smaller = report.checkpoint_bytes / max(report.final_bytes, 1)
    factor = f"{smaller:.2f} times smaller" if smaller >= 1 else f"{1 / smaller:.2f} times larger"
    yield (
        f"wrote {report.output}: {format_bytes(report.output_bytes)}; the weights are {factor} than the "
        f"{format_bytes(report.checkpoint_bytes)} of the source"
    )
    yield f"read by: {', '.join(report.read_by)}"
    if report.documents:
        yield f"for people: {', '.join(report.documents)}"


def print_plan(summary: Mapping[str, Any], plan: MemoryPlan, console: Console) -> None:
    """Print what a load would take, and what was decided about its modules and about tensors that belong to none.

    `summary` has `modules`, each with `kind`, `scheme` (None: kept as stored) and `reason`, and the names and numbers
    of a report about tensors that are not loaded.
    """
    table = _table("Predicted memory", right=("bytes",))
    for label, size in plan.sizes():
        table.add_row(label, format_bytes(size))
    console.print(table)
    counted = Counter((m["kind"], m["scheme"] or "as stored", m["reason"]) for m in summary["modules"])
    decisions = _table("modules", "kind", "scheme", "reason", right=())
    for (kind, scheme, reason), count in counted.items():
        decisions.add_row(*map(Text, (str(count), kind, scheme, reason)))  # a pattern may look like markup
    console.print(decisions)
    fetches = summary.get("fetches")
    if fetches is not None:
        console.print(
            f"from a server: {format_bytes(fetches['fetched_bytes'])} in {fetches['requests']:,} requests, of "
            f"{format_bytes(fetches['needed_bytes'])} that are read",
            highlight=False,
        )
    unapplied = (f"warning: {each['message']}" for each in summary["unapplied"])
    for line in (*_left(summary), *unapplied, _beside(summary["beside_the_peak"]), summary["verdict"]["message"]):
        console.print(line, highlight=False, markup=False)


def _beside(sizes: Mapping[str, Any]) -> str:
    """What comes on top of the peak."""
    parts = [f"this process {format_bytes(sizes['process_bytes'])}"]
    if sizes["attention_cache_bytes"] is not None:
        many = f"{sizes['requests']} sequences" if sizes["requests"] > 1 else "one sequence"
        parts.append(
            f"attention cache of {many} of {sizes['attention_cache_tokens']:,} tokens "
            f"{format_bytes(sizes['attention_cache_bytes'])}"
        )
    return f"on top of the peak: {'; '.join(parts)}"


def _left(summary: Mapping[str, Any]) -> Iterator[str]:
    """Lines about tensors that are not loaded, about parameters that have none, are not tied, or not finite."""
    nbytes, ignored = format_bytes(summary["unexpected_bytes"]), summary["ignored_tensors"]
    named = {
        f"unexpected, not loaded ({nbytes})": summary["unexpected"],
        "in several shards, the index names one": summary["overlaid"],
        "initialized, not in the checkpoint": summary["initialized"],
        "not tied, as their values differ": summary.get("untied", ()),
        "not finite": [str(NonFiniteReport(**each)) for each in summary.get("non_finite", ())],
    }
    if ignored:
        yield f"passed over by the model class: {ignored} tensors"
    yield from (f"{what}: {_names(names)}" for what, names in named.items() if names)


def _names(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > NAMES_PER_REASON else ""
    return ", ".join(names[:NAMES_PER_REASON]) + more


def mean_and_min_sqnr(layers: Iterable[LayerReport]) -> tuple[float, float] | None:
    """Mean over layers and minimum of the SQNR (dB), exact and all-zero layers left out; None without any."""
    values = [sqnr for layer in layers if (sqnr := _finite_sqnr(layer)) is not None]
    return (math.fsum(values) / len(values), min(values)) if values else None


def _finite_sqnr(layer: LayerReport) -> float | None:
    return layer.sqnr_db if layer.sqnr_db is not None and math.isfinite(layer.sqnr_db) else None


def _schemes(layers: list[LayerReport]) -> Table:
    groups: dict[tuple[str, str], list[LayerReport]] = defaultdict(list)
    for layer in layers:
        groups[layer.scheme, layer.kind].append(layer)
    table = _table("scheme", "kernel", right=("layers", "weights", "bytes in", "bytes out", "SQNR, min"))
    for (scheme, kind), group in sorted(groups.items()):
        sqnr = mean_and_min_sqnr(group)
        table.add_row(
            scheme,
            ", ".join(sorted({layer.kernel for layer in group})),
            f"{len(group)} {kind}",
            _count(sum(layer.numel for layer in group)),
            _short(sum(layer.bytes_in for layer in group)),
            _short(sum(layer.bytes_out for layer in group)),
            f"{sqnr[0]:.1f}, {sqnr[1]:.1f} dB" if sqnr else "-",
        )
    return table


def _worst(layers: list[LayerReport]) -> list[tuple[float, LayerReport]]:
    known = [(sqnr, layer) for layer in layers if (sqnr := _finite_sqnr(layer)) is not None]
    return sorted(known, key=lambda pair: (pair[0], pair[1].name))[:WORST_LAYERS]


def _worst_layers(worst: list[tuple[float, LayerReport]]) -> Table:
    table = _table("worst layers", right=("SQNR", "max error", "amax", "saturated", "zero"))
    for sqnr, layer in worst:
        table.add_row(
            Text(layer.name),
            f"{sqnr:.1f} dB",
            _number(layer.max_abs_error),
            _number(layer.amax),
            _share(layer.saturated_fraction),
            _share(layer.zero_fraction),
        )
    return table


def _kept(kept: list[KeptReport]) -> Table:
    reasons: dict[str, list[KeptReport]] = defaultdict(list)
    for module in kept:
        reasons[module.reason].append(module)
    table = _table("kept as stored, because", "modules", right=("bytes",))
    for reason, modules in sorted(reasons.items(), key=lambda item: -sum(module.bytes for module in item[1])):
        names = ", ".join(module.name for module in modules[:NAMES_PER_REASON])
        more = f", ... ({len(modules)} in all)" if len(modules) > NAMES_PER_REASON else ""
        table.add_row(Text(reason), Text(names + more), format_bytes(sum(module.bytes for module in modules)))
    return table


def _memory(report: LoadReport) -> Table:
    table = _table("memory", right=("measured", "planned"))
    table.add_row("checkpoint", format_bytes(report.checkpoint_bytes), "")
    table.add_row("final", format_bytes(report.final_bytes), format_bytes(report.predicted_final_bytes))
    table.add_row("peak", format_bytes(report.peak_bytes), format_bytes(report.predicted_peak_bytes))
    table.add_row("staging", format_bytes(report.staging_peak_bytes), "")
    table.add_row("before the load", format_bytes(report.baseline_bytes), "")
    return table


def _table(*left: str, right: tuple[str, ...]) -> Table:
    """Columns that become narrower where the terminal is: what does not fit into a line goes on in the next."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in left:
        table.add_column(title, overflow="fold")
    for title in right:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _short(size: int) -> str:
    number, unit = format_bytes(size).split()
    return f"{float(number):.3g} {unit}" if float(number) < 1000 else f"{float(number):.0f} {unit}"


def _count(value: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
