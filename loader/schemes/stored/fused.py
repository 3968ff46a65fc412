"""FP8 weights of all experts of a layer in one tensor: the matrices of the experts one below the other.

What transformers saves for models that have their experts so: `X` [E, N, K] and `X_scale_inv` (or `X_scale`), with
scales for blocks, rows or experts in the same order, or two an expert, for gate and up. Seen as one matrix [E * N, K]
it has the layouts of a linear layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...checkpoint.headers import TensorEntry
from ...errors import UnsupportedCheckpointError
from ...kernels.formats import FP8_BLOCK, WeightFormat
from .layouts import FP8, float32, repeated
from .modules import Read, StoredModule
from .weights import StoredTensor, StoredWeight

_NAMES = {
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_activation_scale": "activation_scale",
    "_input_scale": "input_scale",
}
"""What follows on the name of a weight of all experts, and what such a tensor of a linear layer is called."""
_BLOCK_ROWS = FP8_BLOCK.block_rows


def modules_of_fused(tensors: Mapping[str, TensorEntry]) -> set[str]:
    """The modules that may have weights of all experts: few or none among a hundred thousand tensors."""
    return {name.rpartition(".")[0] for name, entry in tensors.items() if len(entry.shape) == 3}


def take_fused(found: dict[str, TensorEntry]) -> Iterator[tuple[str, dict[str, TensorEntry]]]:
    """Take the weights of all experts out of the tensors of a module: the name of each, and its tensors."""
    for name, entry in list(found.items()):
        if len(entry.shape) == 3 and 0 not in entry.shape and entry.dtype in FP8:
            scales = {role: found.pop(name + suffix) for suffix, role in _NAMES.items() if name + suffix in found}
            if scales:
                yield name, {"weight": found.pop(name), **scales}


class FusedExperts(StoredModule):
    """The tensors of one weight [E, N, K], as a layout of linear layers sees them: those of one matrix [E * N, K]."""

    def __init__(self, name: str, tensors: Mapping[str, TensorEntry], read: Read, dtype: torch.dtype) -> None:
        self._experts, self._rows, columns = tensors["weight"].shape
        rows_of_blocks, columns_of_blocks = FP8_BLOCK.scale_shape(self._rows, columns)
        self._blocks = self._experts * rows_of_blocks, columns_of_blocks
        super().__init__(name, {key: self._flat(key, entry) for key, entry in tensors.items()}, read, dtype)

    @property
    def kind(self) -> tuple[Any, ...]:
        return self._experts, *super().kind

    def shaped(
        self, tensor: str, dtypes: Collection[torch.dtype], shapes: Collection[tuple[int, ...]], *, why: str
    ) -> TensorEntry:
        """As of a linear layer; a scale of an expert, or of a half of one, stands for one of each of its rows.

        Raises `UnsupportedCheckpointError` for scales of blocks that would reach from one expert to the next.
        """
        entry, of_rows = self._left.get(tensor), (self._experts * self._rows, 1)
        if entry is not None and of_rows in shapes:
            counts = (self._experts, *((2 * self._experts,) if self._rows % 2 == 0 else ()))
            if _count(entry) in counts and entry.shape not in shapes:
                self._left[tensor] = entry._replace(shape=of_rows)
        elif entry is not None and self._rows % _BLOCK_ROWS and entry.shape == self._blocks:
            raise UnsupportedCheckpointError(
                f"{self.name} has {self._rows} rows for each expert, which blocks of {_BLOCK_ROWS} do not divide; such "
                f"blocks are read of single experts only: load the checkpoint this one was made from"
            )
        return super().shaped(tensor, dtypes, shapes, why=why)

    def weight(
        self, fmt: WeightFormat, shape: tuple[int, ...], parts: tuple[StoredTensor, ...], **more: Any
    ) -> StoredWeight:
        """The weight of all experts."""
        one = super().weight(fmt, shape, tuple(map(self._by_row, parts)), **more)
        return one._replace(name=self.name, experts=self._experts, rows=self._rows)

    def _flat(self, name: str, entry: TensorEntry) -> TensorEntry:
        if not name.startswith("weight"):
            return entry._replace(shape=()) if _count(entry) == self._experts else entry  # the largest is taken
        if entry.shape[:2] == (self._experts, self._rows) and len(entry.shape) == 2:
            return entry._replace(shape=(self._experts * self._rows, 1))
        if len(entry.shape) != 3 or entry.shape[0] != self._experts:
            return entry
        return entry._replace(shape=(self._experts * entry.shape[1], entry.shape[2]))

    def _by_row(self, part: StoredTensor) -> StoredTensor:
        """A scale for so many rows as one for each."""
        each = self._experts * self._rows // max(_count(part.entry), 1)
        if part.role != "scale" or part.block != 1 or each <= 1 or part.entry.shape[1:] != (1,):
            return part
        return part._replace(block=each, convert=repeated(float32, each))


def _count(entry: TensorEntry) -> int:
    return entry.nbytes // entry.dtype.itemsize
