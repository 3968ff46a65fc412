"""The support matrix as tables to read, in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..kernels.registry import PLATFORMS
from .registry import AS_STORED, DEFAULT
from .stored.read import READERS
from .support import METHODS, Support, merged, support_matrix

HARDWARE = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X", "gfx950": "MI350X"}
"""A GPU of each platform, by the name people know it under."""
_SLOW = "torch"


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of as many cells, and what to know about them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def support_tables() -> tuple[Table, ...]:
    """What the schemes are, which checkpoints there are of each, and what multiplies by them on which platform."""
    rows = tuple(merged(support_matrix()))
    return _schemes(rows), _checkpoints(rows), _kernels(rows)


def overview(tables: tuple[Table, ...]) -> Table:
    """What the weights are, and where they come from and go to, in one wide table."""
    schemes, checkpoints, _ = tables
    joined = tuple((*what[:4], *where[1:]) for what, where in zip(schemes.rows, checkpoints.rows, strict=True))
    return Table(
        schemes.title, (*schemes.header[:4], *checkpoints.header[1:]), joined, (schemes.notes[0], *checkpoints.notes)
    )


def online() -> Table:
    """The schemes that a BF16, FP16 or FP32 checkpoint can be quantized with, by the bits of a weight's code."""
    rows = [row for row in support_matrix() if row.online]
    names: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        names.setdefault(tuple(sorted({fmt.code_bits for fmt in row.formats.values()})), []).append(row.name)
    cells = tuple((", ".join(each), " and ".join(map(str, bits))) for bits, each in sorted(names.items()))
    alone = [f"`{row.name}` is for {kind} only" for row in rows for kind in row.formats if len(row.formats) == 1]
    return Table("Schemes", ("scheme", "bits of a code"), cells, (f"{'; '.join((_special_names(rows), *alone))}.",))


def markdown(table: Table) -> str:
    """Header, rows and notes of a table in Markdown."""
    rows = ((", ".join(f"`{name}`" for name in first.split(", ")), *others) for first, *others in table.rows)
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.header, *rows)]
    lines.insert(1, "| " + " | ".join(["---"] * len(table.header)) + " |")
    return "\n".join((*lines, *(f"\n{note}" for note in table.notes)))


def _schemes(rows: tuple[Support, ...]) -> Table:
    cells = ((row.name, _layers(row), row.weights, row.scale, ", ".join(row.activations) or "-") for row in rows)
    mse = ", ".join(f"`{row.name}`" for row in rows if "mse" in row.scale_modes)
    notes = (
        f"Layers: linear ones, experts of MoE models, or both. {_special_names(rows)}.",
        "Activations stay as they are unless a kernel or `--activations` rounds them, to one of those named here; "
        "static scales come with a checkpoint.",
        f"`--scale-mode mse`, scales of least squared error, is for {mse}.",
    )
    header = ("scheme or format", "layers", "weights", "scale", "activations")
    return Table("Schemes, and formats that are only read", header, tuple(cells), notes)


def _special_names(rows: Iterable[Support]) -> str:
    """What the names mean that are no row."""
    auto = f"`auto` is what a checkpoint is stored in if it is quantized, else `{DEFAULT}`"
    aliases = (f"`{alias}` is `{row.name}`" for row in rows for alias in row.aliases)
    return "; ".join((auto, f"`{AS_STORED}` quantizes nothing", *aliases))


def _layers(row: Support) -> str:
    return "both" if len(row.formats) == 2 else next(iter(row.formats))


def _checkpoints(rows: tuple[Support, ...]) -> Table:
    tools = "; ".join(f"`{method}`, {READERS[method].tool}" for method in METHODS)
    cells = ((row.name, "yes" if row.online else "-", *(_stored(row, method) for method in METHODS)) for row in rows)
    only = ", ".join(f"`{row.name}`" for row in rows if not row.kept)
    notes = (
        f"Online: quantized while a BF16, FP16 or FP32 checkpoint is read. The other columns are the `quant_method` in "
        f"a checkpoint's config.json: {tools}.",
        "Write: `quantload convert --format`. Whatever is read can also be quantized anew to any scheme"
        + (f"; {only} only that." if only else "."),
    )
    title = "Where weights come from, and what they are written to"
    return Table(title, ("scheme or format", "online", *METHODS), tuple(cells), notes)


def _stored(row: Support, method: str) -> str:
    kinds: dict[tuple[str, ...], list[str]] = {}
    for verb, held in (("read", row.read_from), ("write", row.written_as)):
        if method in held:
            kinds.setdefault(held[method], []).append(verb)
    every = tuple(row.formats)
    words = (", ".join(verbs) + ("" if held == every else f" {held[0]}") for held, verbs in kinds.items())
    return ", ".join(words) or "-"


def _kernels(rows: tuple[Support, ...]) -> Table:
    kept = [row for row in rows if row.kept]
    names: dict[tuple[str, ...], list[str]] = {}
    for row in kept:
        names.setdefault(tuple(_matmuls(row, platform) for platform in PLATFORMS), []).append(row.name)
    found = (row.kernels(kind, kind, name) for row in kept for kind in row.formats for name in PLATFORMS)
    matmuls = {kernel.name: kernel for kernels in found for kernel in kernels}
    rounding = ", ".join(f"`{name}`" for name, kernel in matmuls.items() if kernel.rounds_activations)
    slow = "; ".join(text for row in kept if row.online for text in _quantized_slowly(row))
    notes = (
        f"{rounding} round activations too. Where there are two, the first is for linear layers, the second for "
        f"experts. Every format has `{_SLOW}` as well, plain torch operations: the meaning of the others, and slow.",
        *([f"Quantized by plain torch operations: {slow}."] if slow else ()),
    )
    columns = (f"{name} ({HARDWARE[name]})" if name in HARDWARE else name for name in PLATFORMS)
    rows_by_kernels = tuple((", ".join(schemes), *cells) for cells, schemes in names.items())
    return Table("What multiplies by the weights", ("scheme or format", *columns), rows_by_kernels, notes)


def _matmuls(row: Support, platform: str) -> str:
    """The best kernel for linears and, where it is another one, for experts."""
    found = dict.fromkeys(_best(row, kind, platform) for kind in row.formats)
    return " / ".join(found)


def _best(row: Support, kind: str, platform: str) -> str:
    kernels = row.kernels(kind, kind, platform)
    first = next((i for i, kernel in enumerate(kernels) if not kernel.needs), 0)
    return ", else ".join(kernel.name for kernel in kernels[: first + 1])


def _quantized_slowly(row: Support) -> Iterator[str]:
    """A scheme that has no kernel of its own to quantize some layers with, and where."""
    slow: dict[str, list[str]] = {}
    for name in PLATFORMS:
        kinds = [kind for kind in row.formats if row.kernels(kind, "quantize", name)[0].name == _SLOW]
        if kinds:
            slow.setdefault(" and ".join(kinds), []).append(name)
    for layers, platforms in slow.items():
        where = "everywhere" if len(platforms) == len(PLATFORMS) else f"on {', '.join(platforms)}"
        yield f"`{row.name}` ({layers}) {where}"
