"""`assert_load_memory`: a load must not take more memory than a test allows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import PolicyError, QuantloadError
from .amounts import format_bytes, parse_bytes
from .logs import MemoryLog, parse_all
from .report import LoadReport

Limit = str | int
LoadEvidence = str | os.PathLike[str] | MemoryLog | LoadReport | Mapping[str, Any]


def assert_load_memory(
    log_or_report: LoadEvidence, peak_below: Limit | None = None, increase_below: Limit | None = None
) -> None:
    """Fail with `AssertionError` where a load's peak or the memory it left behind is not below the limit.

    `log_or_report` is log text of quantload or SGLang, a `MemoryLog`, a `LoadReport` or its dict or JSON, or a path to
    a file of log text or report JSON. Limits are bytes or text such as `17 GiB`; at least one is needed. In a log with
    several loads or ranks, each must be below. The peak of a log without a peak line, as SGLang's, is before +
    increase. Raises `PolicyError` for no limit or a malformed one, `QuantloadError` for a log without the numbers.
    """
    __tracebackhide__ = True
    if peak_below is None and increase_below is None:
        raise PolicyError("assert_load_memory has nothing to check; give peak_below, increase_below or both")
    checks = [
        (what, attribute, parse_bytes(limit))
        for what, attribute, limit in (("peak", 0, peak_below), ("increase", 1, increase_below))
        if limit is not None
    ]
    loads = list(_measured(log_or_report))
    failures = []
    for what, column, limit in checks:
        known = [(label, measured[column]) for label, *measured in loads if measured[column] is not None]
        if not known:
            raise QuantloadError(
                f"the log has no {what} of memory; log at INFO (SGLang: --log-level debug) and give the whole text"
            )
        failures += [
            f"{what} memory of {label} is {format_bytes(size)} ({size} bytes), not below {format_bytes(limit)}"
            f" ({limit} bytes): {format_bytes(size - limit)} over"
            for label, size in known
            if size is not None and size >= limit
        ]
    if failures:
        raise AssertionError("\n".join(failures))


def _measured(evidence: LoadEvidence) -> Iterable[tuple[str, int | None, int | None]]:
    """(label, peak, increase) of every load in `evidence`."""
    if isinstance(evidence, Mapping):
        evidence = LoadReport.from_dict(evidence)
    if isinstance(evidence, LoadReport):
        yield f"the load of {evidence.model}", evidence.peak_bytes, evidence.increase_bytes
        return
    if isinstance(evidence, MemoryLog):
        yield _label(evidence, 1, 1), evidence.reference_bytes, evidence.increase_bytes
        return
    text = _text(evidence)
    report = _report_in(text)
    if report is not None:
        yield from _measured(report)
        return
    loads = parse_all(text)
    if not loads:
        raise QuantloadError(
            f"no load in this log of {len(text)} characters that starts with {text[:40]!r}; give the whole text,"
            " logged at INFO (SGLang: --log-level debug), a load report, or a path that exists"
        )
    for number, load in enumerate(loads, 1):
        yield _label(load, number, len(loads)), load.reference_bytes, load.increase_bytes


def _report_in(text: str) -> Mapping[str, Any] | None:
    """The load report that `text` is the JSON of; None for a log, whose lines may be JSON too."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "peak_bytes" in values else None


def _text(evidence: object) -> str:
    if isinstance(evidence, os.PathLike):
        return Path(evidence).read_text(encoding="utf-8")
    if not isinstance(evidence, str):
        raise PolicyError(
            f"assert_load_memory got {type(evidence).__name__};"
            " give log text, a MemoryLog, a LoadReport, its dict or a path"
        )
    # A path has one line and no room for a log line; a name too long for the system is text as well.
    if "\n" not in evidence and 0 < len(evidence) < 4096:
        try:
            if Path(evidence).is_file():
                return Path(evidence).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return evidence
    return evidence


def _label(load: MemoryLog, number: int, count: int) -> str:
    label = "the load" if count == 1 else f"load {number} of {count}"
    return f"{label} on rank {load.rank}" if load.rank else label
