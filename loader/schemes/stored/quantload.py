"""quantload's own form of a quantized checkpoint: codes and scales as its modules hold them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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


def read_quantload(
    settings: Settings, tensors: Mapping[str, TensorEntry], read: Read, dtype: torch.dtype
) -> StoredCheckpoint:
    """`formats`, `shapes` ([E or null, N, K]) and `transposed` say what each weight is; X_scale has the scales of X.

    Raises `CheckpointError` for another `format_version`, and for tensors that are missing or do not fit.
    """
    settings.choice("format_version", (FORMAT_VERSION,))
    shapes = settings.mapping("shapes")
    transposed = frozenset(settings.strings("transposed"))
    weights = {}
    for name, fmt in settings.mapping("formats").items():
        if not isinstance(fmt, str) or fmt not in FORMATS:
            raise settings.error(f"formats.{name}", fmt, tuple(FORMATS))
        experts, rows, columns = _shape(settings, shapes, name)
        parts = _parts(FORMATS[fmt], name, tensors, (experts, rows, columns))
        weights[name] = StoredWeight(
            name, FORMATS[fmt], experts, rows, columns, dtype, parts, transposed=name in transposed
        )
    taken = {entry.name for weight in weights.values() for entry in weight.entries()}
    plain = {name: entry for name, entry in tensors.items() if name not in taken}
    return StoredCheckpoint(METHOD, weights, plain)


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
