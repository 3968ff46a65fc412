"""Tensors that are handed over one by one, in any order, on their way to the closures of a draft."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ..checkpoint.crew import Crew, Stopped
from ..checkpoint.headers import TensorEntry
from ..draft import Draft
from ..errors import NonFiniteWeightError, ShapeMismatchError, UnexpectedWeightsError
from ..geometry.regions import Region
from ..model.routes import targets
from ..online.observing import scales_are_shared
from ..online.weight_loader import DirectWeightLoader, OnlineWeightLoader
from ..options import LoadOptions
from ..pieces.cuts import CutRegion
from ..pieces.plain_delivery import located
from ..pieces.whole import WholeConversion
from .buffered import Buffered, check_dtype, check_part
from .parts import Landed, landed, pieces
from .settings import TensorNames
from .shared import Twins
from .values import own_routes, own_shape

Start = Sequence[int]
Call = Callable[[], None]
_INLINE = 4 << 20
"""Bytes up to which a tensor is quantized in the caller's thread: to start others takes as long."""


class Arrivals:
    """Hands tensors on, whole or in parts, and remembers what is to come; one thread at a time.

    `on_touch` is told a parameter before something is written to it.
    """

    def __init__(
        self,
        draft: Draft,
        options: LoadOptions,
        unused: TensorNames,
        twins: Twins,
        on_touch: Callable[[str], None],
    ) -> None:
        self._draft, self._sinks, self._twins, self._on_touch = draft, draft.loaders.sinks, twins, on_touch
        self._chunk_bytes, self._workers = options.chunk_bytes, options.worker_count()
        self._unused = {entry.name for entry in unused}
        self._entries: dict[str, TensorEntry] = dict(draft.index.tensors)
        self._spans = draft.routes.spans
        self._whole = {name: conversion for conversion in draft.routes.whole for name in conversion.names()}
        self._held: dict[Hashable, list[tuple[TensorEntry, Landed]]] = {}
        self._buffers: dict[str, Buffered] = {}
        self.arrived: dict[str, int] = {}
        """Elements of each tensor that came, of those that this rank has; see `_needed`."""
        self.bytes = 0

    def take(self, name: str, tensor: Tensor, start: Start | None = None) -> None:
        """Take a tensor, or the part of it whose first element is that at `start`.

        One that came completely before is replaced. Raises a `RouteError` for what is no part of the model, or of
        another shape, `NonFiniteWeightError` and `UnsupportedCheckpointError` for what cannot be quantized.
        """
        entry = self._known(name, tensor, start)
        if entry is None or not tensor.numel():
            return
        self.bytes += tensor.nbytes
        needed, parts = self._needed(name), None
        if name not in self._buffers and name not in self._whole:
            parts = landed(tensor, entry.shape, start or (), self._spans.get(name, ()), self._sinks)
            if parts is not None and not parts:  # all of it is of other ranks
                return
        if self.arrived.get(name) == needed:
            self._again(entry)
        before = self.arrived.get(name, 0)
        if parts is not None:
            self.arrived[name] = before + _numel(parts)
            self._deliver(entry._replace(dtype=tensor.dtype), parts)
            return
        if before and name not in self._buffers:
            raise ShapeMismatchError(
                f"{name}: a part of shape {tuple(tensor.shape)} at {start} cuts through rows or codes, those before it "
                f"did not; hand over whole rows, or the whole tensor"
            )
        buffered = self._buffers.setdefault(name, Buffered(entry, tensor))
        buffered.put(tensor, start)
        if buffered.is_complete:
            self.arrived[name] = needed
            self._complete(entry._replace(dtype=tensor.dtype))

    def wants(self, name: str) -> bool:
        """Whether something of a tensor is to be taken; also of one that is not known, which is an error."""
        return name not in self._entries or self._needed(name) > 0

    def _needed(self, name: str) -> int:
        """Elements of a tensor that this rank has, each counted for every place that it goes to."""
        if name in self._whole:
            return math.prod(self._entries[name].shape)
        return sum(span.region.numel for span in self._spans.get(name, ()))

    def first_pass(self, given: Iterable[tuple[str, Tensor, Start | None]]) -> None:
        """Look at tensors that will come again, where their scales depend on what else comes.

        Scales of what is not all there, or comes twice, are left to `take`.
        """
        counts: dict[str, int] = {}
        observed: dict[Hashable, list[Landed]] = {}
        left: set[Hashable] = set()
        for name, tensor, start in given:
            entry = self._known(name, tensor, start)
            if entry is None or not tensor.numel() or name in self._whole:
                continue
            parts = landed(tensor, entry.shape, start or (), self._spans.get(name, ()), self._sinks) or ()
            counts[name] = counts.get(name, self.arrived.get(name, 0)) + _numel(parts)
            for part in parts:
                if isinstance(part.sink, DirectWeightLoader) or self._is_local(part):
                    continue
                key = _scales(part)
                if counts[name] > self._needed(name):
                    left.add(key)
                elif key not in left:
                    self._observe(entry, [part])
                    observed.setdefault(key, []).append(part._replace(values=part.values[:0]))
        for key, parts in observed.items():
            if key in left or not all(map(_is_known, parts)):
                self._forget(key, parts)

    def _forget(self, key: Hashable, parts: Iterable[Landed]) -> None:
        """Have nothing observed of matrices, but what is held of them."""
        for part in parts:
            assert isinstance(part.sink, OnlineWeightLoader)
            part.sink.reset(part.region)
        for held, part in self._held.get(key, ()):
            self._observe(held, [part])

    def missing(self) -> list[str]:
        """Tensors that came in part, and those that wait for others which get their scales with them."""
        partial = [name for name, count in self.arrived.items() if count < self._needed(name)]
        partial += [name for name, buffered in self._buffers.items() if not buffered.is_complete]
        together = [name for name, buffered in self._buffers.items() if buffered.is_complete]
        waiting = [entry.name for held in self._held.values() for entry, _ in held]
        return [
            *(f"the rest of {name}" for name in partial),
            *(f"what is computed together with {name}" for name in together),
            *(f"what has one scale with {name}" for name in dict.fromkeys(waiting)),
        ]

    def absent(self, names: Iterable[TensorEntry]) -> list[str]:
        """Those of some tensors that did not come."""
        return [entry.name for entry in names if self.arrived.get(entry.name, 0) < self._needed(entry.name)]

    def regions(self) -> dict[str, list[Region]]:
        """What was written, or begun to be."""
        touched: dict[str, list[Region]] = {}
        for name in (name for name, count in self.arrived.items() if count):
            for span in self._spans.get(name, ()):
                touched.setdefault(span.parameter, []).append(span.region)
            for target in targets(self._draft.mapped, self._whole[name]) if name in self._whole else ():
                touched.setdefault(target, []).extend(self._matrices(target))
        return touched

    def _matrices(self, parameter: str) -> Iterator[Region]:
        """All of a parameter, each of its matrices as one region."""
        landing = self._draft.loaders.landing(parameter)
        for expert in (None,) if landing.experts is None else range(landing.experts):
            yield Region(expert, (0, landing.rows), (0, landing.columns))

    def _known(self, name: str, tensor: Tensor, start: Start | None = None) -> TensorEntry | None:
        """What is known of a tensor of this name; `None`: the model has no use for it."""
        if name in self._unused:
            return None
        if name not in self._entries:
            self._learn(name)
        entry = self._entries[name]
        check_part(entry, tensor, start)
        for span in self._spans.get(name, ()):
            check_dtype(name, tensor.dtype, self._sinks[span.parameter])
        return entry

    def _learn(self, name: str) -> None:
        """Find out about a tensor that is called as the parameter it goes to."""
        parameter = self._draft.mapped.shapes.tensors.get(name)
        routes = None if parameter is None or name not in self._sinks else own_routes(self._draft, name)
        if parameter is None or routes is None or routes.whole:
            raise UnexpectedWeightsError(
                f"{name} is neither a tensor of the checkpoint that the model was loaded from nor a parameter of it"
            )
        self._spans[name] = routes.spans.get(name, [])
        shape = own_shape(self._draft, name)
        nbytes = math.prod(shape) * parameter.dtype.itemsize
        self._entries[name] = TensorEntry(name, parameter.dtype, shape, 0, 0, nbytes)

    def _complete(self, entry: TensorEntry) -> None:
        """All of a tensor that had to be gathered is there."""
        conversion = self._whole.get(entry.name)
        if conversion is None:
            whole = self._buffers.pop(entry.name).tensor
            parts = landed(whole, entry.shape, (), self._spans[entry.name], self._sinks)
            assert parts is not None
            self._deliver(entry, parts)
            return
        names = conversion.names()
        if any(self.arrived.get(name) != self._needed(name) for name in names):
            return
        tensors = {name: self._buffers.pop(name).tensor for name in names}
        entries = [self._entries[name]._replace(dtype=tensors[name].dtype) for name in names]
        for target in targets(self._draft.mapped, conversion):
            self._on_touch(target)
        shapes, landing = self._draft.mapped.shapes, self._draft.loaders.landing
        WholeConversion(shapes, conversion, entries, self._sinks, landing).run(tensors)

    def _deliver(self, entry: TensorEntry, parts: Sequence[Landed]) -> None:
        for parameter in {part.span.parameter for part in parts}:
            self._on_touch(parameter)
        direct: list[Landed] = []
        local: list[Landed] = []
        others: list[Landed] = []
        for part in parts:
            if isinstance(part.sink, DirectWeightLoader):
                if not self._twins.brought(part.sink, part.region, part.values):
                    direct.append(part)
            else:
                (local if self._is_local(part) else others).append(part)
        self._load(entry, [*direct, *local])
        if not others:
            return
        self._observe(entry, [part for part in others if not _is_known(part)])
        self._load(entry, [part for part in others if _is_known(part)])
        for part in others:
            key = _scales(part)
            if not _is_known(part):
                self._held.setdefault(key, []).append((entry, part._replace(values=part.values.clone())))
                continue
            for held, waiting in self._held.pop(key, ()):
                self._load(held, [waiting])

    def _is_local(self, part: Landed) -> bool:
        return all(piece.sink.scales_are_local(piece.region) for piece in pieces(part, self._chunk_bytes))

    def _observe(self, entry: TensorEntry, parts: Iterable[Landed]) -> None:
        """See the maxima of parts: matrix after matrix, as the ranks exchange those that they divide in one order."""
        for of_matrix in self._by_matrix(parts):
            self._run([_call(entry, each, observe=True) for each in of_matrix])

    def _by_matrix(self, parts: Iterable[Landed]) -> Iterable[list[Landed]]:
        """The pieces of parts, those that get their scales together in one list where ranks divide the model."""
        found: dict[Hashable, list[Landed]] = {}
        for part in parts:
            key = _scales(part) if self._draft.rank_plan.ranks > 1 else None
            found.setdefault(key, []).extend(pieces(part, self._chunk_bytes))
        return found.values()

    def _load(self, entry: TensorEntry, parts: Iterable[Landed]) -> None:
        self._run([_call(entry, piece, observe=False) for part in parts for piece in pieces(part, self._chunk_bytes)])

    def _run(self, calls: Sequence[Call]) -> None:
        count = min(self._workers, len(calls))
        if count < 2:
            for call in calls:
                call()
            return
        waiting = iter(calls)

        def work(crew: Crew, _: int) -> None:
            for call in waiting:
                if crew.stopping:
                    raise Stopped
                call()

        Crew(count, None).work(work)

    def _again(self, entry: TensorEntry) -> None:
        """A tensor that came completely comes once more."""
        conversion = self._whole.get(entry.name)
        if conversion is not None and entry.name in self._buffers:  # nothing was computed of it yet
            del self._buffers[entry.name], self.arrived[entry.name]
            return
        if conversion is not None:
            for target in targets(self._draft.mapped, conversion):
                self._on_touch(target)
                sink: Any = self._sinks[target]
                for region in self._matrices(target):  # and nothing else of its layer, which may have come already
                    sink.reset(region)
            for name in conversion.names():
                self.arrived.pop(name, None)
            return
        self.arrived.pop(entry.name)
        groups: set[Hashable] = set()
        for span in self._spans[entry.name]:
            sink = self._sinks[span.parameter]
            self._on_touch(span.parameter)
            assert isinstance(sink, (DirectWeightLoader, OnlineWeightLoader))
            sink.reset(span.region)
            if isinstance(sink, OnlineWeightLoader):
                groups.add(_scales_in(sink, span.region))
        for key in groups & self._held.keys():  # what was observed of them went with it
            self._held[key] = [(held, part) for held, part in self._held[key] if held.name != entry.name]
            for held, part in self._held[key]:
                self._observe(held, [part])


def _numel(parts: Iterable[Landed]) -> int:
    return sum(part.region.numel for part in parts)


def _scales(part: Landed) -> Hashable:
    """Stands for what gets its scales with a part: matrices, or one shard of a matrix."""
    assert isinstance(part.sink, OnlineWeightLoader)
    return _scales_in(part.sink, part.region)


def _scales_in(sink: OnlineWeightLoader, region: Region) -> Hashable:
    """The same for a region, which lies within a shard."""
    parameter = sink.parameter
    is_shared = scales_are_shared(parameter.layout, parameter.scale_group)
    return sink.scale_group(region.expert), None if is_shared else parameter.layout.blocks(region)[0].shard


def _is_known(part: Landed) -> bool:
    return isinstance(part.sink, OnlineWeightLoader) and part.sink.parameter.was_observed(part.region)


def _call(entry: TensorEntry, part: Landed, observe: bool) -> Call:
    return functools.partial(_hand_over, entry, part, observe)


def _hand_over(entry: TensorEntry, part: Landed, observe: bool) -> None:
    values = part.values if part.values.stride(-1) == 1 or part.values.shape[-1] == 1 else part.values.contiguous()
    try:
        (part.sink.observe if observe else part.sink.load_region)(values, part.region)
    except NonFiniteWeightError as error:
        raise located(error, entry, CutRegion(part.span, part.region, 0, 0, 0)) from None
