"""The page of a load that failed: what happened, how far it came, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .advice import Advice, advice_for, advised
from .charts import memory_chart
from .document import document
from .elements import Markup, element, joined, prose, table
from .numbers import duration, size
from .sections import PHASES, chart, command_box, section


def failure_page(failure: Mapping[str, Any]) -> str:
    """The page from `describe_failure` of `memory/attempt.py`."""
    title = f"{failure['model']} was not loaded"
    return document(title, failure_body(failure), failure_data(failure))


def failure_body(failure: Mapping[str, Any]) -> Markup:
    """What stands in `main` of that page."""
    advice = advice_for(failure["error"]["types"])
    attempt = failure["attempt"]
    parts = [
        element("h1", f"{failure['model']} as {failure['quantization']} on {failure['device']}"),
        element("p", "Not loaded: ", prose(advice.means), class_="headline"),
        section(
            "What happened",
            element("p", _where(attempt)),
            element("div", f"{advised(failure['error']['types'])}: {failure['error']['message']}", class_="message"),
            name="happened",
        ),
        _next(failure, advice),
        _progress(attempt) if attempt is not None else "",
        _command(failure["command"], advice),
        section(
            "For a report",
            element("p", "Versions, for somebody who is to help you: send this page as it is."),
            table("Versions", ("what", "value"), list(failure["versions"].items()), left=2),
            name="versions",
        ),
    ]
    return element("div", joined(parts), class_="failed")


def _next(failure: Mapping[str, Any], advice: Advice) -> Markup:
    steps = (element("li", prose(step)) for step in advice.steps_for(failure["options"]))
    model = shlex.quote(failure["model"])
    commands = [each.replace("MODEL", model) for each in advice.commands]
    said = element("p", "This helps to find out:") if commands else ""
    return section("What to do next", element("ol", *steps), said, *map(command_box, commands), name="next")


def _command(command: str | None, advice: Advice) -> Markup:
    if not command:
        return Markup("")
    if advice.passes:
        return section("How to try again", command_box(command), name="again")
    said = element("p", "As it stands it fails again: change it, or the checkpoint, as is said above.")
    return section("The command that failed", said, command_box(command), name="again")


def failure_data(failure: Mapping[str, Any]) -> dict[str, Any]:
    """The data of its chart: memory until the end."""
    attempt = failure["attempt"]
    if attempt is None:
        return {}
    return {"memory": memory_chart(attempt, [("peak", attempt["peak_bytes"]), *_known_sizes(attempt)])}


def _where(attempt: Mapping[str, Any] | None) -> str:
    if attempt is None:
        return "It ended before the load began. No memory is held, and nothing was written."
    where = attempt["where"]
    phase = f"{where['phase']!r} ({PHASES.get(where['phase'], '')})"
    read = f", with {size(where['bytes_read'])} of {size(where['bytes_total'])} read" if where["bytes_total"] else ""
    return (
        f"It ended in the phase {phase}, after {duration(where['seconds'])}{read}. What it held was freed; the "
        f"checkpoint was not changed."
    )


def _known_sizes(attempt: Mapping[str, Any]) -> list[tuple[str, int]]:
    where = attempt["where"]
    names = {"predicted peak": "predicted_peak_bytes", "limit": "limit_bytes", "available": "available_bytes"}
    return [(name, where[key]) for name, key in names.items() if where[key]]


def _progress(attempt: Mapping[str, Any]) -> Markup:
    rows = [(phase["name"], duration(phase["seconds"]), PHASES.get(phase["name"], "")) for phase in attempt["phases"]]
    head = ("phase", "time", "what happens in it")
    sizes = [("peak until then", attempt["peak_bytes"]), *_known_sizes(attempt)]
    return section(
        "How far it came",
        chart("memory", "Memory in bytes over the seconds until the load failed."),
        table("Sizes", ("what", "size"), [(name, size(nbytes, 4)) for name, nbytes in sizes]),
        table(
            "Phases, the last is the one that failed",
            head,
            rows,
        ),
        name="progress",
    )
