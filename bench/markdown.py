"""Tables and goals as Markdown, and a document's marked places filled with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from goals import Goal
from machine import headline

WORDS = {True: "met", False: "missed", None: "unknown"}
_PLACE = re.compile(r"<!-- table: (?P<name>[a-z0-9_]+) -->\n.*?<!-- /table -->", re.DOTALL)


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A Markdown table, the first column left, the others right aligned."""
    lines = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    lines.insert(1, "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |")
    return "\n".join(lines)


def goal_table(goals: Sequence[Goal]) -> str:
    """The goals as a Markdown table: met, or missed and by how much."""
    rows = [(goal.name, goal.checkpoint, WORDS[goal.met], goal.reached) for goal in goals]
    lines = ["| goal | on | | reached |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def source_line(result: Mapping[str, Any]) -> str:
    """When, where and from which file: the line under a table."""
    return f"{headline(dict(result['machine']))} (`{result['file']}`)"


def fill(text: str, tables: Mapping[str, str]) -> str:
    """`text` with what stands between `<!-- table: NAME -->` and `<!-- /table -->` replaced by the table of that name.

    Raises `KeyError` for a place whose table does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise KeyError(f"there is no table {name!r}; there are {', '.join(tables)}")
        return f"<!-- table: {name} -->\n\n{tables[name].strip()}\n\n<!-- /table -->"

    return _PLACE.sub(replace, text)
