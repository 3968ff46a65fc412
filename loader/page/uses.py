"""What can be done with what was loaded or written: commands with the same options."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .elements import Markup, element
from .sections import command_box, section

ONLY_OF_LOAD = {"--html": 1, "--report": 1, "--json": 0, "--digest": 0}
"""Options about the report of a load, which others do not take or need, and how many values each has."""


def uses(report: Mapping[str, Any]) -> Markup:
    """What a person may want next; nothing where a server or Python has loaded the model, and can use it."""
    if report["output"] is not None:
        commands = [shlex.join(["quantload", "load", report["output"]])]
        said = "What was written loads as it is, here and with the tools that the report names:"
    else:
        tokens = _tokens(report["command"] or "")
        if tokens[:2] != ["quantload", "load"]:
            return Markup("")
        options = [*_kept(tokens[2:])]
        commands = [
            shlex.join(["quantload", "generate", *options, "--prompt", "Once upon a time"]),
            shlex.join(["quantload", "serve", *options]),
        ]
        said = "A load alone ends with its report. With the same options, an answer to a prompt, and a server:"
    return section("What to do with it", element("p", said), *map(command_box, commands), name="use")


def _tokens(command: str) -> list[str]:
    """A command taken apart, none where it is no line of a shell: a report is what somebody wrote into a file."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _kept(options: Sequence[str]) -> Iterator[str]:
    """Those that another command takes, too."""
    left = 0
    for token in options:
        name, equals, _ = token.partition("=")
        if left:
            left -= 1
        elif name in ONLY_OF_LOAD:
            left = 0 if equals else ONLY_OF_LOAD[name]
        else:
            yield token
