"""A small table for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def small_table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A title and rows of text as HTML without styles of its own; whatever stands in them is text, never markup."""
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"
