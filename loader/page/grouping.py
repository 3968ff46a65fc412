"""Layers put together for the eye: by where they stand in the model, and by what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MOST_ROWS = 2000
"""Rows of a table above which layers are put together."""
MOST_CELLS = 1500
"""Cells of the heatmap above which several depths share a row."""

Layer = Mapping[str, Any]
"""One of `layers` in the JSON of a report."""


class Place(NamedTuple):
    """`model.layers.5.mlp.experts.17.up` is number 5 in the stack `model.layers`, as its `mlp.experts.*.up`.

    What stands in no stack has the depth None.
    """

    stack: str
    depth: int | None
    module: str


def place_of(name: str) -> Place:
    """Where a module stands, from the first number in its name; every other number is a star."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal() and len(part) < 10), None)
    if first is None or first == len(parts) - 1:
        return Place("", None, name)
    module = ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :])
    return Place(".".join(parts[:first]), int(parts[first]), module)


@dataclass
class Group:
    """What several layers have in common: sums of sizes (bytes, elements), the worst of their errors.

    `worst` is the name of the layer with the lowest SQNR; the mean is of those whose SQNR is a number. `divergence` is
    the largest in nats a token, that of `most_divergent`; None where it was not measured.
    """

    layers: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    numel: int = 0
    lowest: float | None = None
    worst: str | None = None
    saturated: float | None = None
    zero: float | None = None
    divergence: float | None = None
    most_divergent: str | None = None
    schemes: set[str] = field(default_factory=set)
    _sum: float = 0.0
    _known: int = 0

    def add(self, layer: Layer) -> None:
        """One more layer."""
        self.layers += 1
        self.bytes_in += layer["bytes_in"]
        self.bytes_out += layer["bytes_out"]
        self.numel += layer["numel"]
        self.schemes.add(layer["scheme"])
        self.saturated = _larger(self.saturated, layer.get("saturated_fraction"))
        self.zero = _larger(self.zero, layer.get("zero_fraction"))
        sqnr = finite(layer.get("sqnr_db"))
        if sqnr is not None:
            self._sum, self._known = self._sum + sqnr, self._known + 1
            if self.lowest is None or sqnr < self.lowest:
                self.lowest, self.worst = sqnr, layer["name"]
        divergence = finite(layer.get("divergence"))
        if divergence is not None and (self.divergence is None or divergence > self.divergence):
            self.divergence, self.most_divergent = divergence, layer["name"]

    @property
    def mean(self) -> float | None:
        """Mean SQNR in decibels, None where none is known."""
        return self._sum / self._known if self._known else None


@dataclass(frozen=True)
class Heatmap:
    """Cells by row and column; a row is a stretch of depths of one stack, a column a module of a layer."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], Group]
    depths_a_row: int


def by_kind_and_scheme(layers: Iterable[Layer]) -> dict[tuple[str, str], Group]:
    """Layers by `linear` or `experts` and their scheme, the largest first."""
    groups: dict[tuple[str, str], Group] = {}
    for layer in layers:
        groups.setdefault((layer["kind"], layer["scheme"]), Group()).add(layer)
    return dict(sorted(groups.items(), key=lambda item: -item[1].bytes_in))


def by_module(layers: Iterable[Layer]) -> dict[str, Group]:
    """Layers by their names without any number, in the order in which they come."""
    groups: dict[str, Group] = {}
    for layer in layers:
        name = ".".join("*" if part.isdecimal() else part for part in layer["name"].split("."))
        groups.setdefault(name, Group()).add(layer)
    return groups


def worst(layers: Iterable[Layer], number: int) -> list[Layer]:
    """The layers with the lowest SQNR, the worst first."""
    known = [layer for layer in layers if finite(layer.get("sqnr_db")) is not None]
    return sorted(known, key=lambda layer: (layer["sqnr_db"], layer["name"]))[:number]


def most_divergent(layers: Iterable[Layer], number: int) -> list[Layer]:
    """The layers whose quantization moves the predictions most, where it was measured, the worst first."""
    known = [layer for layer in layers if finite(layer.get("divergence")) is not None]
    return sorted(known, key=lambda layer: (-layer["divergence"], layer["name"]))[:number]


def heatmap(layers: Sequence[Layer]) -> Heatmap:
    """Depth by module, at most `MOST_CELLS` cells where the columns allow: several depths share a row then."""
    places = [place_of(layer["name"]) for layer in layers]
    columns = list(dict.fromkeys(place.module for place in places))
    depths: dict[str, int] = {}
    for place in places:
        depths[place.stack] = max(depths.get(place.stack, 0), place.depth or 0)
    rows_there = sum(depth + 1 for depth in depths.values())
    together = max(1, math.ceil(rows_there * len(columns) / MOST_CELLS)) if columns else 1
    keys = sorted({_row(place, together) for place in places})
    row_of, column_of = {key: i for i, key in enumerate(keys)}, {name: i for i, name in enumerate(columns)}
    cells: dict[tuple[int, int], Group] = {}
    for place, layer in zip(places, layers, strict=True):
        cells.setdefault((row_of[_row(place, together)], column_of[place.module]), Group()).add(layer)
    return Heatmap([_label(key, together, depths) for key in keys], columns, cells, together)


def finite(value: float | None) -> float | None:
    """The number, None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _row(place: Place, together: int) -> tuple[str, int]:
    return place.stack, -1 if place.depth is None else place.depth // together


def _label(key: tuple[str, int], together: int, depths: Mapping[str, int]) -> str:
    stack, row = key
    if row < 0:
        return NO_STACK
    name = f"{stack}." if sum(1 for each in depths if each) > 1 else ""
    first = row * together
    last = min(first + together - 1, depths[stack])
    return f"{name}{first}" if first == last else f"{name}{first}\N{EN DASH}{last}"


NO_STACK = "outside"


def _larger(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)
