"""Bring parameters back as an earlier load left them: codes, scales and everything else, byte for byte.

Nothing is routed or computed: each parameter of the model has its tensor under its own name, read straight into its
final storage, and a layer finishes with the statistics that were measured when it was quantized.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import Piece
from ..checkpoint.workspace import Workspace
from ..checkpoint.writer import TensorSpec
from ..errors import ShapeMismatchError
from ..model.attach import WeightLoaders
from ..online.weight_loader import RestorableLoader


def final_tensors(loaders: WeightLoaders, parameters: Iterable[str]) -> Iterator[TensorSpec]:
    """What `parameters` of the checkpoint become in memory, under the model's own names."""
    for parameter in parameters:
        names = loaders.stored_names(parameter)
        for name, (dtype, shape) in zip(names, loaders.restorable[parameter].final_tensors, strict=True):
            yield TensorSpec(name, dtype, shape)


def plan_restored(
    tensors: Mapping[str, TensorEntry],
    loaders: WeightLoaders,
    parameters: Iterable[str],
    statistics: Mapping[str, Tensor],
    chunk_bytes: int,
) -> list[Piece]:
    """Pieces of `tensors` (by the model's own names) that fill `parameters`, in the order they lie on disk.

    `statistics` are those of each quantized module; without them it finishes with none measured. Raises
    `ShapeMismatchError` where tensors are not exactly those of `final_tensors`.
    """
    parameters = list(parameters)
    _check(tensors, final_tensors(loaders, parameters))
    pieces: list[Piece] = []
    left = dict(statistics)
    for parameter in parameters:
        measured = left.pop(parameter.rpartition(".")[0], None)
        restored = _Restored(loaders.restorable[parameter], measured)
        entries = [tensors[name] for name in loaders.stored_names(parameter)]
        pieces += restored.pieces(entries, chunk_bytes)
    return sorted(pieces, key=lambda piece: (piece.shard, piece.extents[0][0]))


class _Restored:
    """One parameter on its way: complete when the last of its pieces was read."""

    def __init__(self, loader: RestorableLoader, statistics: Tensor | None) -> None:
        self._loader, self._statistics = loader, statistics
        self._left = 0
        self._lock = threading.Lock()

    def pieces(self, entries: Iterable[TensorEntry], chunk_bytes: int) -> Iterator[Piece]:
        for number, entry in enumerate(entries):
            step = chunk_bytes // entry.dtype.itemsize * entry.dtype.itemsize
            for start in range(0, entry.nbytes, step):
                count = min(step, entry.nbytes - start)
                self._left += 1
                target = functools.partial(self._target, number, start, start + count)
                arrived = functools.partial(self._arrived, number, entry.dtype, start)
                yield Piece(entry.shard, ((entry.offset + start, count),), arrived, target=target)

    def _target(self, number: int, start: int, stop: int) -> Tensor:
        return self._loader.tensors()[number].view(-1).view(torch.uint8)[start:stop]

    def _arrived(self, number: int, dtype: torch.dtype, start: int, workspace: Workspace) -> None:
        self._loader.look_at(number, start // dtype.itemsize, workspace.buffer.view(dtype))
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._loader.restored(self._statistics)


def _check(tensors: Mapping[str, TensorEntry], expected: Iterable[TensorSpec]) -> None:
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in expected}
    given = {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}
    for name in wanted.keys() | given.keys():
        if wanted.get(name) != given.get(name):
            raise ShapeMismatchError(f"{name} is stored as {given.get(name)}, the model has {wanted.get(name)}")
