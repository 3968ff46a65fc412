"""The support matrix: every scheme, and every format that is only read, by layers, checkpoints and platforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, takewhile
from typing import Any

from ..kernels.formats import FORMATS, WeightFormat
from ..kernels.registry import OPERATIONS, PLATFORMS, SCALE_MODES, Kernel, platform_kernels
from .activations import pairs
from .exported.registry import EXPORT_FORMATS
from .registry import ENTRIES, SchemeEntry
from .stored.quantload import METHOD as OWN_METHOD
from .stored.read import READERS

KINDS = ("linear", "experts")
"""The `quant_method` of what quantload keeps for itself, which has every format."""
METHODS = tuple({reader.tool: name for name, reader in [*READERS.items()][::-1] if name != OWN_METHOD}.values())[::-1]
"""The other `quant_method`s, the first of each tool."""


@dataclass(frozen=True)
class Support:
    """What there is for a scheme, or for a format of weights that no scheme makes.

    `formats` are those of its weights, by the kind of layer it is for: linear, experts.
    """

    name: str
    aliases: tuple[str, ...]
    weights: str
    scale: str
    formats: Mapping[str, WeightFormat]
    online: bool

    @cached_property
    def read_from(self) -> dict[str, tuple[str, ...]]:
        """The kinds of layers that are read from quantized checkpoints, by their `quant_method`."""
        return self._kinds((method, READERS[method].holds) for method in METHODS)

    @cached_property
    def written_as(self) -> dict[str, tuple[str, ...]]:
        """The kinds of layers that `quantload convert` can write, by the name of the checkpoint format."""
        return self._kinds((export.name, export.holds) for export in EXPORT_FORMATS.values() if self.online)

    def _kinds(self, holders: Iterable[tuple[str, Callable[..., bool]]]) -> dict[str, tuple[str, ...]]:
        """What can hold which kinds of layers; all of them, where they have different formats."""
        found = {}
        for name, holds in holders:
            kinds = tuple(kind for kind, fmt in self.formats.items() if holds(fmt, experts=kind == "experts"))
            if kinds and (len(kinds) == len(self.formats) or len(set(self.formats.values())) == 1):
                found[name] = kinds
        return found

    @property
    def activations(self) -> tuple[str, ...]:
        """What the input of its matmuls can be rounded to, its own format first; for each kind if they differ."""
        return tuple(dict.fromkeys(str(each) for fmt in self.formats.values() for each in pairs(fmt)))

    @property
    def scale_modes(self) -> tuple[str, ...]:
        """The ways in which its scales can be chosen."""
        return tuple(
            mode
            for mode in SCALE_MODES
            if self.online and all(mode in fmt.scale_modes for fmt in self.formats.values())
        )

    @property
    def kept(self) -> bool:
        """Whether a checkpoint in this format can stay as it is, rather than be quantized anew."""
        return all(self.kernels(kind, operation, "cpu") for kind in self.formats for operation in _of(kind))

    def kernels(self, kind: str, operation: str, platform: str) -> list[Kernel]:
        """What can run an operation of linear layers on a platform, or of experts, best first, installed or not."""
        return platform_kernels(operation, self.formats[kind].name, platform)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON; of the kernels of a platform the names, by kind of layer and operation."""
        return {
            "formats": {kind: fmt.name for kind, fmt in self.formats.items()},
            "read_from": {method: list(kinds) for method, kinds in self.read_from.items()},
            "convert_to": {name: list(kinds) for name, kinds in self.written_as.items()},
            "requantize_only": not self.kept,
            "activations": list(self.activations),
            "scale_modes": list(self.scale_modes),
            "platforms": {
                name: {
                    kind: {op: [kernel.name for kernel in self.kernels(kind, op, name)] for op in _of(kind)}
                    for kind in self.formats
                }
                for name in PLATFORMS
            },
        }


def _of(kind: str) -> Iterator[str]:
    """The operations of a kind of layer: all but the matmul of the other one."""
    return (operation for operation in OPERATIONS if operation == kind or operation not in KINDS)


def support_matrix() -> tuple[Support, ...]:
    """A row for every scheme but `none`, then one for every group of formats that are read and made by no scheme."""
    schemes = [scheme_support(entry) for entry in ENTRIES if entry.linear or entry.experts]
    made = {fmt.name for scheme in schemes for fmt in scheme.formats.values()}
    read = frozenset().union(*(READERS[method].formats for method in METHODS))
    rest = [_format([fmt]) for name, fmt in FORMATS.items() if fmt in read and name not in made]
    return (*schemes, *rest)


def merged(rows: Iterable[Support]) -> Iterator[Support]:
    """The same with formats in one row that differ in their scales only."""
    for (online, *_), group in groupby(rows, key=_alike):
        if online:
            yield from group
        else:
            yield _format([row.formats["linear"] for row in group])


def _alike(row: Support) -> tuple[object, ...]:
    return row.online, row.weights, tuple(row.read_from.items()), row.activations, row.kept


def scheme_support(entry: SchemeEntry) -> Support:
    """What there is for a scheme."""
    formats = entry.formats
    return Support(entry.name, entry.aliases, entry.weights, entry.scale, formats, online=bool(formats))


def _format(formats: list[WeightFormat]) -> Support:
    names = [fmt.name for fmt in formats]
    name = names[0] if len(names) == 1 else f"{_common_beginning(names)}*"
    return Support(name, (), formats[0].label, _scale(formats), dict.fromkeys(KINDS, formats[0]), online=False)


def _common_beginning(names: list[str]) -> str:
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in shared)


def _scale(formats: list[WeightFormat]) -> str:
    dtypes = list(dict.fromkeys(str(fmt.scale_dtype).removeprefix("torch.") for fmt in formats))
    groups = [str(size) for size in sorted({fmt.block_cols for fmt in formats if fmt.block_cols})]
    rows = ["row"] if any(not fmt.block_cols for fmt in formats) else []
    zero = " and zero point" if formats[0].scale_words == 2 else ""
    return f"{', '.join(dtypes)}{zero} per {', '.join(groups + rows)}"
