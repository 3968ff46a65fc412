"""Weights that nobody has trained: a model as a load of its checkpoint would leave it, without reading a weight.

For planning and for benchmarks: memory, kernels and shapes are those of the real one. Everything of a load runs, on
numbers from a seeded generator instead of those in the files.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .cache.session import NoCache, Reading
from .checkpoint.folder import Checkpoint
from .checkpoint.headers import TensorEntry
from .checkpoint.index import CheckpointIndex, Shard
from .checkpoint.source import Source
from .model import transformers_api
from .model.skeleton import find_model

if TYPE_CHECKING:
    from .draft import Draft

Weights = Literal["checkpoint", "dummy"]
Kind = Literal["values", "codes", "scale", "zeros", "stored"]

SEED = 20261129
DEVIATION = 0.02
"""Standard deviation of values: about that of trained weights."""
SCALE, EXPONENT = 0.004, 119
"""A scale of stored codes, as a number and as the exponent of a power of two near it."""
PERIOD = 1 << 22
"""Elements after which the numbers repeat."""
_ROLES: Mapping[str, Kind] = {"codes": "codes", "scale": "scale", "scale_2": "scale", "zero_point": "zeros"}


class DummyWeights(NoCache):
    """Stands where a load has its cache: what is read is made up."""

    @contextlib.contextmanager
    def reading(self, draft: Draft) -> Iterator[Reading]:
        """Where a load reads."""
        kinds: dict[str, Kind] = {}
        for weight in draft.sources.weights.values():
            kinds |= {part.entry.name: _ROLES.get(part.role, "stored") for part in weight.parts}
            kinds |= {entry.name: "stored" for entry in (*weight.values, *filter(None, [weight.input_scale]))}
        files = self._checkpoint.files.source(self._options)
        yield Reading(MadeUp(files, draft.index, kinds), draft.index.shards, draft.plan)


class MadeUp(Source):
    """Files whose tensors have other numbers than the real ones, the same ones each time.

    What `kinds` says of a tensor: `values`, which is what the others are, are normally distributed, `codes` any codes
    that stand for finite numbers, a `scale` is one number all over, and `stored` are read, as they say how something is
    stored. Whole numbers are zero.
    """

    read_bytes = 64 << 20

    def __init__(self, files: Source, index: CheckpointIndex, kinds: Mapping[str, Kind]) -> None:
        self._files, self._kinds = files, kinds
        self._by_shard: dict[str, list[TensorEntry]] = {shard.path: [] for shard in index.shards}
        for entry in sorted(index.tensors.values(), key=lambda entry: (entry.shard, entry.offset)):
            self._by_shard[index.shards[entry.shard].path].append(entry)
        self._offsets = {path: [entry.offset for entry in entries] for path, entries in self._by_shard.items()}
        self._sizes = {shard.path: shard.size for shard in index.shards}
        self._patterns: dict[tuple[Kind, torch.dtype], Tensor] = {
            key: _pattern(*key) for key in {(self._kind(entry), entry.dtype) for entry in index.tensors.values()}
        }

    def size(self, path: str) -> int:
        """Size of the real file."""
        return self._sizes[path]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer with the numbers that stand there."""
        entries, stop = self._by_shard[path], offset + buffer.nbytes
        number = max(bisect_right(self._offsets[path], offset) - 1, 0)
        while number < len(entries) and entries[number].offset < stop:
            entry = entries[number]
            first, last = max(entry.offset, offset), min(entry.offset + entry.nbytes, stop)
            if first < last:
                self._fill(path, entry, first, buffer[first - offset : last - offset])
            number += 1
        return buffer.nbytes

    def prefetch(self, path: str, offset: int, length: int) -> None:
        """There is nothing to be read."""

    def release(self, path: str, offset: int, length: int) -> None:
        """Nothing was read."""

    def close(self) -> None:
        """Close the real files."""
        self._files.close()

    def _kind(self, entry: TensorEntry) -> Kind:
        return self._kinds.get(entry.name, "values")

    def _fill(self, path: str, entry: TensorEntry, first: int, buffer: memoryview) -> None:
        kind = self._kind(entry)
        if kind == "stored":
            self._files.read_into(path, first, buffer)
            return
        pattern = self._patterns[kind, entry.dtype]
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        # Another place in the pattern for each tensor, the same whatever pieces it is read in.
        at = (entry.offset // 64 * 4096 + first - entry.offset) % pattern.numel()
        done = 0
        while done < target.numel():
            count = min(pattern.numel() - at, target.numel() - done)
            target[done : done + count] = pattern[at : at + count]
            done, at = done + count, 0


def _pattern(kind: Kind, dtype: torch.dtype) -> Tensor:
    """Bytes that are repeated."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    if dtype == torch.float8_e8m0fnu or (kind == "scale" and dtype == torch.uint8):
        return torch.full((PERIOD,), EXPONENT, dtype=torch.uint8)
    if kind == "scale" and dtype.is_floating_point:
        return torch.full((PERIOD,), SCALE if dtype.itemsize > 1 else 1.0).to(dtype).view(torch.uint8)
    if kind == "codes" or (kind == "values" and dtype.is_floating_point and dtype.itemsize == 1):
        return _finite(torch.randint(0, 256, (PERIOD,), dtype=torch.uint8, generator=generator), dtype)
    if kind == "values" and dtype.is_floating_point:
        return torch.empty(PERIOD).normal_(0.0, DEVIATION, generator=generator).to(dtype).view(torch.uint8)
    return torch.zeros(PERIOD * dtype.itemsize, dtype=torch.uint8)


def _finite(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes without those that are no number, where they are codes of a float."""
    if dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        return codes | 1
    return codes & 0xF7 if dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else codes


def index_without_files(checkpoint: Checkpoint, trust_remote_code: bool) -> CheckpointIndex | None:
    """The tensors that a folder with a config alone would have, called as the parameters; `None` if it has weights."""
    if not checkpoint.root.is_dir() or any(checkpoint.root.glob("*.safetensors*")) or checkpoint.elsewhere is not None:
        return None
    model, dtype = find_model(checkpoint, trust_remote_code).build(())
    dtype_of, tied = transformers_api.DtypePlan(model, dtype), transformers_api.tied_names(model)
    tensors: dict[str, TensorEntry] = {}
    offset = 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            own = dtype_of(name, tensor.dtype)
            nbytes = math.prod(tensor.shape) * own.itemsize
            tensors[name] = TensorEntry(name, own, tuple(tensor.shape), 0, offset, nbytes)
            offset += -(-nbytes // 8) * 8
    return CheckpointIndex((Shard("", offset),), tensors, sum(entry.nbytes for entry in tensors.values()), {})
