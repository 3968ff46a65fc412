"""The tensors of a checkpoint by the module they belong to, each taken once and checked for what it should be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.headers import TensorEntry
from ...errors import CheckpointError
from ...kernels.formats import WeightFormat
from .weights import StoredTensor, StoredWeight

Read = Callable[[TensorEntry], Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What scales are stored as; each is exact in float32."""


class StoredModule:
    """The tensors of one module, by the last part of their names."""

    def __init__(self, name: str, tensors: Mapping[str, TensorEntry], read: Read, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self._left = dict(tensors)
        self._read = read
        self._values: list[TensorEntry] = []

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._left

    @property
    def left(self) -> Mapping[str, TensorEntry]:
        """The tensors that nothing has taken yet."""
        return self._left

    @property
    def kind(self) -> tuple[Any, ...]:
        """What modules have in common of which the same can be read: the names, dtypes and shapes of their tensors."""
        return tuple([(tensor, entry.dtype, entry.shape) for tensor, entry in self._left.items()])

    def take_all_but(self, left: Collection[str]) -> Mapping[str, TensorEntry]:
        """Take all tensors but those named, of a module that is known to have what it should: all it had."""
        before = self._left
        self._left = {tensor: before[tensor] for tensor in left}
        return before

    def take(self, tensor: str, dtypes: Collection[torch.dtype], *, why: str) -> TensorEntry:
        """The tensor of that name; raises `CheckpointError` if it is missing or not of one of `dtypes`."""
        entry = self._left.pop(tensor, None)
        if entry is None:
            raise CheckpointError(
                f"{self.name}.{tensor} is missing: {why}; the checkpoint is incomplete, or its config is of another one"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{entry.name} is {_dtype(entry.dtype)}; {why} takes {' or '.join(map(_dtype, dtypes))}; export the "
                f"checkpoint in one of these, or correct its config"
            )
        return entry

    def matrix(self, tensor: str, dtypes: Collection[torch.dtype], *, why: str) -> TensorEntry:
        """Like `take`, a tensor of two dimensions with something in it."""
        entry = self.take(tensor, dtypes, why=why)
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise CheckpointError(
                f"{entry.name} has the shape {list(entry.shape)}; {why} is read as a matrix of at least one element"
            )
        return entry

    def shaped(
        self, tensor: str, dtypes: Collection[torch.dtype], shapes: Collection[tuple[int, ...]], *, why: str
    ) -> TensorEntry:
        """Like `take`, a tensor of one of some shapes."""
        entry = self.take(tensor, dtypes, why=why)
        if entry.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(
                f"{entry.name} has the shape {list(entry.shape)}; {why} needs {wanted} to fit its codes; the config is "
                f"of another checkpoint, or the tensor is damaged"
            )
        return entry

    def value(self, entry: TensorEntry) -> Tensor:
        """The content of a small tensor that was taken."""
        self._values.append(entry)
        return self._read(entry)

    def scalar(self, tensor: str, *, why: str) -> float:
        """The value of a tensor of one number, which must be finite."""
        value = float(self.value(self.shaped(tensor, FLOATS, ONE, why=why)).item())
        if value != value or value in (float("inf"), float("-inf")):
            raise CheckpointError(f"{self.name}.{tensor} is {value}; {why} must be finite; the tensor is damaged")
        return value

    def weight(
        self, fmt: WeightFormat, shape: tuple[int, ...], parts: tuple[StoredTensor, ...], **more: Any
    ) -> StoredWeight:
        """The weight of this module [N, K], of what was taken from it."""
        rows, columns = shape
        return StoredWeight(
            f"{self.name}.weight", fmt, None, rows, columns, self.dtype, parts, values=tuple(self._values), **more
        )


ONE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
"""The shapes of a tensor with one number."""


def by_module(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Tensors by the name of their module, then by the last part of their own."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, tensor = name.rpartition(".")
        found.setdefault(module, {})[tensor] = entry
    return found


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
