"""Tool calls and reasoning in an answer, where a model wrote them as its tokenizer says; else the text as it is.

A model may write anything, and a limit of tokens cuts it off anywhere: that is no error of the server, whose clients
get what was written as the content of the message.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("quantload")

Event = dict[str, Any]


def parsed_or_text(parse: Callable[[], Any], text: Callable[[], str]) -> dict[str, Any]:
    """The message that `parse` makes of an answer; where it cannot, or its calls are none, one with the text."""
    try:
        message = parse()
        calls = message.get("tool_calls") or []
        if isinstance(calls, list) and all(map(is_call, calls)):
            return dict(message)
        why = "its tool calls have no names or arguments"
    except Exception as error:  # parsers raise whatever the text leads them to
        why = str(error)
    logger.debug("An answer is passed on as it is: %s", why)
    return {"content": text()}


def is_call(value: Any) -> bool:
    """Whether a parsed tool call has what the API wants: a name, and arguments that are JSON."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        return False
    try:
        json.dumps(function["arguments"])
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class ForgivingParser:
    """A parser of a stream of text, as transformers' streamers use it, that never raises.

    When the real one fails, the text of the region it was in, and all that follows, is content.
    """

    def __init__(self, real: Any) -> None:
        self._real = real
        self._failed = False
        self._held = ""
        self.initial_events: list[Event] = self._checked(real.initial_events)

    def feed(self, text: str) -> list[Event]:
        """The events of some more text."""
        if self._failed:
            return _content(text)
        try:
            return self._checked(self._real.feed(text))
        except Exception as error:  # as in `parsed_or_text`
            return self._fail(str(error), text)

    def finalize(self) -> tuple[dict[str, Any], list[Event]]:
        """What the streamers do not use, and the last events."""
        if self._failed:
            return {}, []
        try:
            message, events = self._real.finalize()
            return message, self._checked(events)
        except Exception as error:  # as in `parsed_or_text`
            return {}, self._fail(str(error), "")

    def _checked(self, events: list[Event]) -> list[Event]:
        """The events, with calls that are none as content; keeps the text of a region that is not parsed yet."""
        passed: list[Event] = []
        for event in events:
            if event["type"] == "region_chunk" and event.get("dirty"):
                self._held += event.get("text") or ""
            elif event["type"] == "region_close":
                held, self._held = self._held, ""
                if event.get("field") == "tool_calls" and not is_call(event.get("value")):
                    passed += _content(held)
                    continue
            passed.append(event)
        return passed

    def _fail(self, why: str, text: str) -> list[Event]:
        logger.debug("The rest of an answer is passed on as it is: %s", why)
        self._failed, held = True, self._held
        return _content(held + text)


def _content(text: str) -> list[Event]:
    return [{"type": "region_chunk", "field": "content", "text": text}] if text else []
