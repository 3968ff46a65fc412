"""Modules whose tensors have the same names, dtypes and shapes: what one of them is, the others are too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...checkpoint.headers import TensorEntry
from .modules import StoredModule
from .weights import StoredWeight


class Alike:
    """A weight that was read from a module of `tensors`, to be had from others of its kind without reading them.

    Only for a weight of which the tensors themselves say all: one without `values`.
    """

    def __init__(self, module: StoredModule, weight: StoredWeight, tensors: Mapping[str, TensorEntry]) -> None:
        names = {entry.name: tensor for tensor, entry in tensors.items()}
        self._weight, self._suffix = weight, weight.name.removeprefix(module.name)
        self._left = list(module.left)
        self._tensors = [names[part.entry.name] for part in weight.parts]
        self._namesake = names.get(weight.name)
        self._scale = None if weight.input_scale is None else names[weight.input_scale.name]

    def take(self, module: StoredModule) -> StoredWeight:
        """The weight of another module; its tensors are taken.

        A checkpoint may have a hundred thousand: names and entries that are the same are the same objects.
        """
        weight, parts = self._weight, []
        taken = module.take_all_but(self._left)
        for part, tensor in zip(weight.parts, self._tensors, strict=True):
            entry, dtype, shape = taken[tensor], part.entry.dtype, part.entry.shape
            same = entry.dtype == dtype and entry.shape == shape
            parts.append(part._replace(entry=entry if same else entry._replace(dtype=dtype, shape=shape)))
        activations = weight.activations
        if activations is not None and self._scale is not None:
            activations = replace(activations, scale=taken[self._scale])
        name = f"{module.name}{self._suffix}" if self._namesake is None else taken[self._namesake].name
        return weight._replace(name=name, parts=tuple(parts), activations=activations)
