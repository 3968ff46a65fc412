"""The parts of the page of a load, each a heading and what a person reads under it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .elements import Markup, dotted, element, joined, prose, table
from .grouping import MOST_ROWS, Group, Layer, by_kind_and_scheme, by_module, finite, most_divergent, worst
from .notices import notices
from .numbers import NOT_MEASURED, count, decibels, duration, several, share, size

Report = Mapping[str, Any]
WORST_LAYERS = 10
NAMES_AT_ONCE = 3


def section(heading: str, *children: str, name: str) -> Markup:
    """A part of the page, which links can name."""
    return element("section", element("h2", heading, id=f"{name}-heading"), *children, id=name,
                   aria_labelledby=f"{name}-heading")  # fmt: skip


def chart(name: str, label: str) -> Markup:
    """The place of a chart that a script draws; `label` says what is to be seen in it."""
    return element("div", class_="chart", id=f"chart-{name}", data_chart=name, role="img", aria_label=label)


def headline(report: Report) -> str:
    """The load in one line that a person can repeat."""
    peak, limit = size(report["peak_bytes"], 4), report.get("limit_bytes")
    allowed = f"of {size(limit, 4)} allowed" if limit is not None else (
        f"where {size(report['predicted_peak_bytes'], 4)} were predicted"
    )  # fmt: skip
    return (
        f"{size(report['checkpoint_bytes'])} became {size(report['final_bytes'])} in {duration(report['seconds'])}; "
        f"peak {peak} {allowed}."
    )


def next_steps(report: Report) -> Markup:
    """What to look at, or that there is nothing."""
    found = notices(report)
    if not found:
        said: list[str] = [element("p", "Nothing needs your attention: every weight was quantized or kept for a reason "
                                   "that is given below, and memory stayed within what was expected.")]  # fmt: skip
    else:
        said = [element("ul", *(element("li", element("strong", each.what), " ", prose(each.do)) for each in found),
                        class_="notices")]  # fmt: skip
    return section("What to look at", *said, name="attention")


def memory(report: Report) -> Markup:
    """Memory over time, and the sizes it is to be seen beside."""
    rows = [(label, size(value, 4), meaning) for label, value, meaning in memory_lines(report)]
    return section(
        "Memory over time",
        element("p", "Memory of this process above what it held before the load, as it was measured."),
        chart("memory", "Memory in bytes over the seconds of the load. The numbers are in the table below."),
        table("Sizes", ("what", "size", "meaning"), [(a, b, c) for a, b, c in rows], left=1),
        name="memory",
    )


def memory_lines(report: Report) -> list[tuple[str, int, str]]:
    """Sizes that are drawn as lines: what, bytes, and what it means."""
    found = [
        ("peak", report["peak_bytes"], "highest that was measured"),
        ("final", report["final_bytes"], "the model, when it was loaded"),
        ("predicted peak", report["predicted_peak_bytes"], "computed before the first weight was read"),
        ("as 16 bits", sixteen_bits(report), "the same model in BF16"),
    ]
    if report.get("limit_bytes") is not None:
        found.append(("limit", report["limit_bytes"], "what was allowed: --max-memory"))
    if report.get("available_bytes") is not None:
        found.append(("available", report["available_bytes"], "what the machine had for it before the load"))
    return found


def sixteen_bits(report: Report) -> int:
    """Bytes of the model with 16 bits for each weight that was quantized."""
    layers = report["layers"]
    return int(report["final_bytes"] + sum(2 * layer["numel"] - layer["bytes_out"] for layer in layers))


def where_bytes_went(report: Report) -> Markup:
    """Before and after, by what layers are and their scheme."""
    rows = [
        (what, scheme, f"{number:,}" if number else NOT_MEASURED, size(before), size(after),
         f"{after / before:.0%}" if before else NOT_MEASURED)
        for what, scheme, number, before, after in byte_rows(report)
    ]  # fmt: skip
    return section(
        "Where the bytes went",
        chart("bytes", "Bytes in the checkpoint and in the model by kind of layer, as in the table below."),
        table("Bytes before and after", ("what", "scheme", "modules", "before", "after", "left"), rows, left=2),
        element("p", OTHER_TENSORS),
        name="bytes",
    )


OTHER_TENSORS = (
    "All other tensors are those of no linear or experts module: norms, biases, and embeddings. A weight that the "
    "embedding and the output head share counts once, with the head."
)


def byte_rows(report: Report) -> list[tuple[str, str, int, int, int]]:
    """Kind, scheme, modules, and bytes before and after; what is no linear or experts module comes last."""
    groups = by_kind_and_scheme(report["layers"])
    rows = [(kind, scheme, group.layers, group.bytes_in, group.bytes_out) for (kind, scheme), group in groups.items()]
    kept = sum(module["bytes"] for module in report["kept"])
    if report["kept"]:
        rows.append(("kept", "as stored", len(report["kept"]), kept, kept))
    before = report["checkpoint_bytes"] - sum(row[3] for row in rows)
    after = report["final_bytes"] - sum(row[4] for row in rows)
    if before > 0 or after > 0:
        rows.append(("all other tensors", "as stored", 0, max(0, before), max(0, after)))
    return rows


SQNR = (
    "SQNR, the signal-to-quantization-noise ratio, says how large the weights of a module are beside the error that "
    "rounding them made, in decibels (dB): more is better, at 20 dB the error has a hundredth of the power of the "
    "weights, and each bit more adds about 6. Usual are 18 to 22 dB with four bits, 31 with FP8 and 40 with INT8; look "
    "at what is below 10. It is measured on the weights alone: how much the answers change depends on the module, too."
)


def worst_layers(report: Report) -> Markup:
    """The layers that lost the most, by name."""
    rows = [
        (dotted(layer["name"]), decibels(layer["sqnr_db"]), _number(layer["max_abs_error"]), _number(layer["amax"]),
         share(layer["saturated_fraction"]), share(layer["zero_fraction"]))
        for layer in worst(report["layers"], WORST_LAYERS)
    ]  # fmt: skip
    head = ("module", "SQNR", "largest error", "largest weight", "at the largest code", "zero")
    lost = table(f"The {len(rows)} modules that lost the most", head, rows)
    moved = [
        (dotted(layer["name"]), f"{1000 * layer['divergence']:.3g}", decibels(layer["sqnr_db"]))
        for layer in most_divergent(report["layers"], WORST_LAYERS)
    ]
    if not moved:
        return lost
    caption = f"The {len(moved)} modules that move the predictions most, in thousandths of a nat a token"
    return joined([lost, table(caption, ("module", "divergence", "SQNR"), moved)])


def kept(report: Report) -> Markup:
    """The modules that were kept as stored, by the reason."""
    if not report["kept"]:
        return section("Kept as stored", element("p", "No linear or experts module was."), name="kept")
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for module in report["kept"]:
        reasons.setdefault(module["reason"], []).append(module)
    rows = [
        (reason, _names([module["name"] for module in modules]), f"{len(modules):,}",
         size(sum(module["bytes"] for module in modules)))
        for reason, modules in sorted(reasons.items(), key=lambda item: -sum(m["bytes"] for m in item[1]))
    ]  # fmt: skip
    shown = table("Modules that are not quantized, and why", ("reason", "names", "modules", "size"), rows, left=2)
    return section("Kept as stored", shown, name="kept")


def throughput(report: Report) -> Markup:
    """How fast it was read, and in which part of the load the time went."""
    total = sum(phase["seconds"] for phase in report["phases"]) or report["seconds"] or 1.0
    rows = [
        (phase["name"], duration(phase["seconds"]), f"{phase['seconds'] / total:.0%}", PHASES.get(phase["name"], ""))
        for phase in report["phases"]
    ]
    speed = report["bytes_read"] / report["seconds"] if report["seconds"] > 0 else 0.0
    parts: list[str] = [element("p", f"{size(report['bytes_read'])} were read in {duration(report['seconds'])}: "
                                f"{size(speed)}/s over all of it.")]  # fmt: skip
    parts.append(chart("throughput", "Bytes read per second over the seconds of the load, and the phases."))
    if rows:
        parts.append(table("Phases", ("phase", "time", "share", "what happens in it"), rows))
    return section("Throughput and phases", *parts, name="throughput")


PHASES = {
    "resolve": "find the checkpoint, download what is missing",
    "plan": "read the headers, build the model without weights, decide about each module",
    "compile": "wait for kernels that were not ready yet",
    "check": "compare what it will take with the limit and with the machine",
    "stream": "read pieces and quantize them",
    "finish": "check that all is there, tie weights, close files",
}


def again(report: Report) -> Markup:
    """How to get the same again."""
    facts = [(name, version) for name, version in report["versions"].items()]
    if report.get("commit"):
        facts.insert(0, ("commit of the checkpoint", report["commit"]))
    if report.get("digest"):
        facts.insert(0, ("digest of the final tensors", report["digest"]))
    hint = "" if report.get("digest") else "With --digest the report also has a hash of all final tensors."
    parts = [command_box(command_of(report)), element("p", hint) if hint else ""]
    if facts:
        parts.append(table("Versions and hashes", ("what", "value"), facts, left=2))
    return section("How to get this again", *parts, name="again")


def command_box(command: str) -> Markup:
    """A command to copy."""
    words = joined(part for word in command.split(" ") for part in (" ", element("span", word)))
    return element(
        "div",
        element("pre", element("code", Markup(words[1:])), tabindex="0", role="region", aria_label="Command"),
        element("button", "Copy", type="button", class_="copy", data_copy=command),
        class_="command",
    )


def command_of(report: Report) -> str:
    """What was typed; of a load from Python, the command that does the same as far as the report tells."""
    return str(report.get("command") or shlex.join(
        ["quantload", "load", report["model"], "-q", report["quantization"], "--device", report["device"]]
    ))  # fmt: skip


def all_modules(report: Report) -> Markup:
    """Every quantized module, put together by name where there are very many."""
    layers: Sequence[Layer] = report["layers"]
    if not layers:
        return Markup("")
    if len(layers) <= MOST_ROWS:
        head = ("module", "scheme", "kernel", "weights", "before", "after", "SQNR")
        rows: Iterable[tuple[str, ...]] = (
            (layer["name"], layer["scheme"], layer["kernel"], count(layer["numel"]), size(layer["bytes_in"]),
             size(layer["bytes_out"]), decibels(layer["sqnr_db"]))
            for layer in layers
        )  # fmt: skip
        caption, left = "Every quantized module", 3
    else:
        head = ("modules", "scheme", "how many", "weights", "before", "after", "SQNR, lowest")
        groups = by_module(layers)
        shown = list(groups.items())[:MOST_ROWS]
        rows = ((name, *_group_cells(group)) for name, group in shown)
        caption = f"{len(layers):,} quantized modules, put together by name (* is any number)"
        left = 2
    return element("details", element("summary", caption), table(caption, head, rows, left=left))


def tiles(report: Report) -> Markup:
    """The numbers that are looked for first."""
    known = [value for layer in report["layers"] if (value := finite(layer["sqnr_db"])) is not None]
    quality = f"{sum(known) / len(known):.1f} / {min(known):.1f}" if known else "not measured"
    facts = [
        ("Model", size(report["final_bytes"])),
        ("Peak", size(report["peak_bytes"], 4)),
        ("Time", duration(report["seconds"])),
        ("Quantized", several(len(report["layers"]), "module")),
        ("Kept as stored", several(len(report["kept"]), "module")),
        ("SQNR in dB, mean / lowest", quality),
    ]
    return element("dl", *(element("div", element("dt", a), element("dd", b)) for a, b in facts), class_="tiles")


def _group_cells(group: Group) -> tuple[str, ...]:
    return (
        ", ".join(sorted(group.schemes)), f"{group.layers:,}", count(group.numel), size(group.bytes_in),
        size(group.bytes_out), decibels(group.lowest),
    )  # fmt: skip


def _names(names: list[str]) -> Markup:
    first, more = names[:NAMES_AT_ONCE], names[NAMES_AT_ONCE:]
    shown = ", ".join(first)
    if not more:
        return joined([shown])
    listed = ", ".join(more[:MOST_ROWS]) + (f" and {len(more) - MOST_ROWS:,} more" if len(more) > MOST_ROWS else "")
    return joined([shown, element("details", element("summary", f"{len(more):,} more"), listed)])


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3g}"
