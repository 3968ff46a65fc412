"""quantload's own form of a quantized checkpoint: codes and scales as its modules hold them."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.headers import TensorEntry
from ...errors import CheckpointError
from ...kernels.formats import FORMATS, WeightFormat
from .modules import Read
from .settings import Settings
from .weights import StoredCheckpoint, StoredTensor, StoredWeight, scale_roles

METHOD = "quantload"
FORMAT_VERSION = 1
EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
"""That of an expert in the name of a tensor of its own."""
_ANY = "*"


def alike(name: str) -> str:
    """A name with a `*` for the number of an expert, which those that are alike have in common."""
    return EXPERT_NUMBER.sub(_ANY, name)


def read_quantload(
    settings: Settings, tensors: Mapping[str, TensorEntry], read: Read, dtype: torch.dtype
) -> StoredCheckpoint:
    """`formats`, `shapes` ([E or null, N, K]) and `transposed` say what each weight is; X_scale has the scales of X. A
    `*` in a name stands for the numbers of all experts that have a tensor of such a name.

    Raises `CheckpointError` for another `format_version`, and for tensors that are missing or do not fit.
    """
    settings.choice("format_version", (FORMAT_VERSION,))
    shapes = settings.mapping("shapes")
    transposed = frozenset(settings.strings("transposed"))
    formats = settings.mapping("formats")
    of_experts = _by_pattern(tensors) if any(_ANY in name for name in formats) else {}
    weights = {}
    for said, fmt in formats.items():
        if not isinstance(fmt, str) or fmt not in FORMATS:
            raise settings.error(f"formats.{said}", fmt, tuple(FORMATS))
        experts, rows, columns = _shape(settings, shapes, said)
        for name in of_experts.get(said, (said,)):
            parts = _parts(FORMATS[fmt], name, tensors, (experts, rows, columns))
            weights[name] = StoredWeight(
                name, FORMATS[fmt], experts, rows, columns, dtype, parts, transposed=said in transposed
            )
    taken = {entry.name for weight in weights.values() for entry in weight.entries()}
    plain = {name: entry for name, entry in tensors.items() if name not in taken}
    return StoredCheckpoint(METHOD, weights, plain)


def _by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of experts by the name that those that are alike have in common."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        pattern = alike(name)
        if pattern != name:
            found[pattern].append(name)
    return dict(found)


def _shape(settings: Settings, shapes: Mapping[str, Any], name: str) -> tuple[int | None, int, int]:
    shape = shapes.get(name)
    match shape:
        case [None | int() as experts, int() as rows, int() as columns] if min(experts or 1, rows, columns) > 0:
            return experts, rows, columns
    raise settings.error(f"shapes.{name}", shape, expected="[experts or null, rows, columns]")


def _parts(
    fmt: WeightFormat, name: str, tensors: Mapping[str, TensorEntry], shape: tuple[int | None, int, int]
) -> tuple[StoredTensor, ...]:
    experts, rows, columns = shape
    codes, *scales = (
        _entry(name + tensor.suffix, tensors, tensor.dtype, experts, tensor.shape(rows, columns))
        for tensor in fmt.tensors
    )
    return StoredTensor("codes", codes), *(
        StoredTensor(role, scales[number], fmt.scales[number].block_rows, _word(fmt, number, word))
        for role, (number, word) in scale_roles(fmt).items()
    )


def _entry(
    name: str, tensors: Mapping[str, TensorEntry], dtype: torch.dtype, experts: int | None, shape: tuple[int, int]
) -> TensorEntry:
    entry = tensors.get(name)
    wanted = shape if experts is None else (experts, *shape)
    if entry is None or entry.dtype is not dtype or entry.shape != wanted:
        found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise CheckpointError(f"{name} is {found}; the config needs {dtype} {list(wanted)}; write the checkpoint again")
    return entry


def _word(fmt: WeightFormat, number: int, word: int) -> Callable[[Tensor], Tensor] | None:
    """What takes one word of each block out of a scale tensor that has several."""
    words = fmt.scales[number].width
    return None if words == 1 else functools.partial(_every, word, words)


def _every(first: int, step: int, stored: Tensor) -> Tensor:
    return stored[:, first::step]
