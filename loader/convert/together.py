"""Weights that get their scales together: written to one file, so that a conversion that goes on sees all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..model.merged_modules import merged_modules
from .tensors import KeptTensor, QuantizedTensor


def scale_groups(tensors: Iterable[QuantizedTensor | KeptTensor]) -> list[list[QuantizedTensor]]:
    """Tensors of modules that engines run as one, where their format scales those by one maximum."""
    found: dict[tuple[str, str], QuantizedTensor] = {}
    for tensor in tensors:
        if isinstance(tensor, QuantizedTensor) and tensor.layout.format.one_maximum:
            found[tensor.layout.format.name, tensor.module] = tensor
    formats = dict.fromkeys(name for name, _ in found)
    return [
        [found[fmt, module] for module in modules]
        for fmt in formats
        for modules in merged_modules(module for name, module in found if name == fmt)
    ]


def units(tensors: Sequence[QuantizedTensor | KeptTensor]) -> list[list[QuantizedTensor | KeptTensor]]:
    """All tensors in order, those of a group together where its first one stands."""
    group_of = {tensor.entry.name: group for group in scale_groups(tensors) for tensor in group}
    found: list[list[QuantizedTensor | KeptTensor]] = []
    placed: set[str] = set()
    for tensor in tensors:
        if tensor.entry.name not in placed:
            unit: list[QuantizedTensor | KeptTensor] = [*group_of.get(tensor.entry.name, [tensor])]
            placed.update(each.entry.name for each in unit)
            found.append(unit)
    return found
