"""What commands print on standard output, and leave in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..errors import QuantloadError
from ..shortage import is_shortage

_NO_TERMINAL_WIDTH = 10_000


@contextmanager
def to_stdout() -> Iterator[None]:
    """What standard output refuses inside, on a full disk for one, is said of it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if not is_shortage(error):
            error.filename = error.filename or "standard output"
        raise


def tell(report: Any, path: Path | None, as_json: bool) -> None:
    """Write a report where it was asked for, and show it."""
    if path is not None:
        try:
            report.save(path)
        except OSError as error:
            raise QuantloadError(f"{path} cannot be written: {error.strerror}; all the rest was done") from error
    show(report, as_json)


def show(report: Any, as_json: bool) -> None:
    from ..memory.summary import render

    if as_json:
        print_json(report.to_dict())
    else:
        with to_stdout():
            render(report, tables())


def show_table(found: Any, as_json: bool, shown: Callable[[], tuple[Table, Iterable[str]]]) -> None:
    """Print what was found: as JSON, or a table with lines below that say what its numbers mean."""
    if as_json:
        print_json(found.to_dict())
        return
    with to_stdout():
        console, (table, below) = tables(), shown()
        console.print(table)
        for line in below:
            console.print(line, highlight=False)


def table_of_schemes(titles: Iterable[str]) -> Table:
    """A table with a row for each scheme to come."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("scheme", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    return table


def tables() -> Console:
    """Standard output, as wide as the terminal; where there is none, as wide as any table: nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH)


def print_json(value: dict[str, Any]) -> None:
    with to_stdout():
        print(json.dumps(value, allow_nan=False), flush=True)
