"""Spans of OpenTelemetry for a load: one for all of it, and one in it for each phase.

There are some where the program has set OpenTelemetry up, and else nothing happens, not even an import: who traces has
imported `opentelemetry.trace` before the load, and the spans go to the tracer provider that is set there.
"""

from __future__ import annotations

import sys
from typing import Any

from .memory.versions import versions

TRACING = "opentelemetry.trace"


class LoadSpans:
    """The spans of one load: `quantload.load`, a child of what is current in the caller, and its phases below it.

    `doing` is what the whole is: `load`, `reload` or `convert`. Nothing is made current: spans that a library makes
    meanwhile belong to the caller's. For one thread.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._trace: Any = sys.modules.get(TRACING)
        self._tracer: Any = None
        self._whole: Any = None
        self._phase: Any = None

    def begin(self, phase: str) -> None:
        """A phase begins; the one before has come to its end."""
        if self._trace is None:
            return
        if self._whole is None:
            self._tracer = self._trace.get_tracer("quantload", versions().get("quantload"))
            self._whole = self._tracer.start_span(f"quantload.{self._doing}")
        if self._phase is not None:
            self._phase.end()
        within = self._trace.set_span_in_context(self._whole)
        self._phase = self._tracer.start_span(f"quantload.{phase}", context=within)

    def say(self, **attributes: str | int) -> None:
        """Attributes of the whole, whose names get `quantload.` before them."""
        if self._whole is not None:
            self._whole.set_attributes({f"quantload.{name}": value for name, value in attributes.items()})

    def end(self, error: BaseException | None = None) -> None:
        """The load has ended, with an error that the last phase and the whole are marked with."""
        for span in (self._phase, self._whole):
            if span is None:
                continue
            if error is not None:
                span.record_exception(error)
                span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"))
            span.end()
        self._phase = self._whole = None
