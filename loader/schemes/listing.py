"""The schemes as rows, with the kernels that would serve each on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ..errors import NoKernelError
from ..kernels.registry import OPERATIONS, candidates
from ..options import LoadOptions
from .registry import ENTRIES, SchemeEntry, SchemeFactory, choose_device
from .support import scheme_support, support_matrix
from .support_tables import Table as SupportTable
from .support_tables import support_tables


def list_schemes(device: str | torch.device) -> list[dict[str, Any]]:
    """One row a scheme: name, aliases, what it applies to, format, scale rule, kernels or why there are none.

    `unavailable` gives the other kernels for the kind of device, each with the reason why it cannot run. What follows
    does not depend on the device: formats, checkpoints, activations, and the kernels for every platform.
    """
    target = choose_device(device)
    factory = SchemeFactory(target, LoadOptions())
    return [
        {
            "name": entry.name,
            "aliases": list(entry.aliases),
            "linear": entry.linear is not None,
            "experts": entry.experts is not None,
            "weights": entry.weights,
            "scale": entry.scale,
            "kernels": _kernels(entry, factory),
            "unavailable": _unavailable(entry, target),
            **scheme_support(entry).to_dict(),
        }
        for entry in ENTRIES
    ]


def list_read_only() -> list[dict[str, Any]]:
    """One row for each format that no scheme makes and quantized checkpoints are read in."""
    return [
        {"name": row.name, "weights": row.weights, "scale": row.scale, **row.to_dict()}
        for row in support_matrix()
        if not row.online
    ]


def _kernels(entry: SchemeEntry, factory: SchemeFactory) -> str:
    try:
        scheme = factory.linear(entry.name) or factory.experts(entry.name)
    except NoKernelError as error:
        return f"none: {error}"
    return "-" if scheme is None else scheme.kernel_names


def _unavailable(entry: SchemeEntry, device: torch.device) -> dict[str, str]:
    """Kernels for this kind of device that cannot run on it, with their reasons."""
    found: dict[str, str] = {}
    fmt = entry.linear or entry.experts
    if fmt is None:
        return found
    for operation in OPERATIONS:
        for kernel, reason in candidates(operation, fmt.name, device):
            if reason is not None and kernel.device_type in (None, device.type):
                found.setdefault(kernel.name, reason)
    return found


def print_schemes(device: str | torch.device, to: Console) -> None:
    """Print the support matrix, and which kernels serve on a device of this machine."""
    rows = list_schemes(device)
    for table in support_tables():
        _print_table(table, to)
    serving = _grouped((row["kernels"], row["name"]) for row in rows if row["kernels"] != "-")
    for kernels, names in serving.items():
        to.print(f"On {device}, here: {kernels} for {', '.join(names)}", highlight=False, markup=False)
    missing = _grouped((reason, kernel) for row in rows for kernel, reason in row["unavailable"].items())
    for reason, names in missing.items():
        to.print(f"Not available on {device}: {', '.join(names)} ({reason})", highlight=False, markup=False)


def _print_table(table: SupportTable, to: Console) -> None:
    header, widths = _fitting(table, to.width)
    columns = (Column(title, width=width, overflow="fold") for title, width in zip(header, widths, strict=True))
    printed = Table(*columns, title=table.title, box=SIMPLE_HEAD, title_justify="left", padding=0, show_edge=False)
    for cells in table.rows:
        printed.add_row(*cells)
    to.print(printed)
    for note in table.notes:
        to.print(note.replace("`", ""), highlight=False, markup=False)
    to.print()


def _fitting(table: SupportTable, width: int) -> tuple[list[str], list[int]]:
    """Titles and widths of the columns: whole words where there is room for them, else what is folded.

    rich makes the last columns narrower than nothing where least widths leave it no room, so they are exact ones.
    """
    header = [title.replace(" (", "\n(") for title in table.header]
    room = width - len(header) + 1  # one space between two columns
    for titles in (header, [title.replace("-", "-\n") for title in header]):
        words = [_longest(column, str.split) for column in zip(titles, *table.rows, strict=True)]
        if sum(words) <= room:
            break
    while sum(words) > room and max(words) > 1:
        words[words.index(max(words))] -= 1
    lines = [_longest(column, str.splitlines) for column in zip(titles, *table.rows, strict=True)]
    while sum(words) < room and words != lines:
        lacking = [line - word for line, word in zip(lines, words, strict=True)]
        words[lacking.index(max(lacking))] += 1
    return titles, words


def _longest(cells: Iterable[str], parts: Callable[[str], list[str]]) -> int:
    return max(len(part) for cell in cells for part in parts(cell) or [""])


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The second of each pair by the first, each once."""
    found: dict[str, dict[str, None]] = {}
    for key, value in pairs:
        found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}
