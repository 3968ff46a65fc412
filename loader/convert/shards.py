"""One conversion, the closure of every checkpoint tensor, the shards they write to, and what is finished when."""

from __future__ import annotations

import functools
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import astuple
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry, file_order
from ..checkpoint.output import OutputFolder
from ..checkpoint.writer import Extent, ShardPlan, ShardWriter
from ..collector import collector_paused
from ..geometry.regions import check_no_gaps
from ..geometry.spans import Span
from ..kernels.statistics import merge, new_statistics
from ..model.routes import CheckpointTensor
from ..online.non_finite import NonFinite, NonFiniteValues
from ..online.observing import ScaleGroup
from ..schemes.stored.weights import StoredWeight
from .closures import Buffers, CopyingLoader, ExportingLoader, WritingLoader
from .tensors import KeptTensor, QuantizedTensor
from .together import scale_groups

PlannedTensor = QuantizedTensor | KeptTensor
_STATISTICS, _NON_FINITE = "statistics", "non_finite"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class OpenShards:
    """Gives each tensor of the shards that are not finished yet its closure; use it as a context manager.

    A shard is recorded in `folder` with the statistics of its tensors, which those who take it up later report as if
    they had quantized it, and with what was found in tensors that are kept: `non_finite` is told of that. `masks` are
    those that go to buffers. `on_layer(module name, statistics)` runs once a module, in the thread that wrote its last
    piece.
    """

    @collector_paused()
    def __init__(
        self,
        tensors: Sequence[PlannedTensor],
        shards: Sequence[ShardPlan],
        folder: OutputFolder,
        on_layer: Callable[[str, Tensor], None],
        non_finite: NonFiniteValues | None = None,
        masks: Container[str] = (),
    ) -> None:
        self._non_finite, self._masks = non_finite or NonFiniteValues(), masks
        self.entries: list[TensorEntry] = []
        self.stored: list[StoredWeight] = []
        self.spans: dict[str, list[Span]] = {}
        self.sinks: dict[str, WritingLoader] = {}
        self._folder = folder
        self._modules = _ModuleStatistics(tensors, on_layer)
        self._writers: dict[str, ShardWriter] = {}
        self._statistics: dict[str, list[tuple[str, int, list[float]]]] = defaultdict(list)
        self._buffers = Buffers()
        self._complete: list[Callable[[], None]] = []
        where = {name: plan.path for plan in shards for name in plan.offsets}
        members: dict[str, list[PlannedTensor]] = defaultdict(list)
        for tensor in tensors:
            members[where[tensor.specs()[0].name]].append(tensor)
        for plan in shards:
            self._prepare(plan, members[plan.path])
        self.entries.sort(key=file_order)
        self.stored.sort(key=file_order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        # Writers and closures call back here: what they hold is free now, not at the collector's next round.
        self._writers.clear()
        self.sinks.clear()

    def begin(self) -> None:
        """Count what earlier runs finished, and what has no elements."""
        for complete in self._complete:
            complete()
        self._complete.clear()

    def check_complete(self) -> None:
        """Raise `MissingWeightsError` naming every region that has not been written."""
        check_no_gaps((gap for sink in self.sinks.values() for gap in sink.missing()), "parts that were never written")

    def _prepare(self, plan: ShardPlan, tensors: Iterable[PlannedTensor]) -> None:
        tensors = list(tensors)
        notes = self._folder.finished(plan)
        if notes is not None:
            self._complete.append(functools.partial(self._take_up, notes[_STATISTICS], notes[_NON_FINITE]))
            return
        writer = self._writers[plan.path] = ShardWriter(self._folder.files, plan, len(tensors), self._record)
        grouped: set[str] = set()
        groups: dict[Hashable, list[list[QuantizedTensor]]] = defaultdict(list)
        for group in scale_groups(tensors):
            groups[tuple(_kind(tensor) for tensor in group)].append(group)
            grouped.update(tensor.entry.name for tensor in group)
        stacks: dict[Hashable, list[QuantizedTensor]] = defaultdict(list)
        for tensor in tensors:
            if isinstance(tensor, KeptTensor):
                self._copy(tensor, writer)
            elif tensor.entry.name not in grouped:
                stacks[_kind(tensor)].append(tensor)
        for stack in stacks.values():
            self._quantize(stack, writer)
        for alike in groups.values():
            loaders = [self._quantize(stack, writer) for stack in zip(*alike, strict=True)]
            together = ScaleGroup([loader.layout for loader in loaders])
            for loader in loaders:
                loader.group = together

    def _copy(self, tensor: KeptTensor, writer: ShardWriter) -> None:
        # Its bytes, whatever they stand for: no kernel looks at them, and torch need not know the dtype.
        values = tensor.entry

        def look(part: Tensor, first: int) -> None:
            masks, pitch = values.name in self._masks, part.shape[1]
            self._non_finite.look(
                values.name, values.shape, part, values.dtype, first=first, pitch=pitch, masks=masks, piece=False
            )

        entry = values._replace(dtype=torch.uint8, shape=(values.nbytes,))
        loader = CopyingLoader(values, writer, writer.done, look)
        self._attach(entry, loader, tensor.spans)

    def _quantize(self, tensors: Sequence[QuantizedTensor], writer: ShardWriter) -> ExportingLoader:
        """Give tensors that are alike one closure, in whose coordinates each is an expert where they are several."""
        module = tensors[0].assignment.name

        def written(statistics: Tensor) -> None:
            self._statistics[writer.plan.path].append((module, len(tensors), statistics.tolist()))
            self._modules.add(module, len(tensors), statistics)
            writer.done(len(tensors))

        loader = ExportingLoader(tensors, writer, self._buffers, written)
        if len(tensors) == 1:
            self._attach(tensors[0].entry, loader, tensors[0].spans)
            return loader
        sink = f"{tensors[0].entry.name} and those like it"
        for number, tensor in enumerate(tensors):
            self._attach(tensor.entry, loader, [_of_expert(span, sink, number) for span in tensor.spans])
        return loader

    def _attach(self, entry: CheckpointTensor, loader: WritingLoader, spans: Sequence[Span]) -> None:
        """Have a tensor read for a closure, which all of it goes to."""
        if entry.nbytes == 0:
            self._complete.append(loader.finish)
            return
        if isinstance(entry, StoredWeight):
            self.stored.append(entry)
        else:
            self.entries.append(entry)
        self.spans[entry.name] = list(spans)
        if spans[0].parameter not in self.sinks:
            self.sinks[spans[0].parameter] = loader

    def _take_up(self, statistics: Iterable[tuple[str, int, list[float]]], non_finite: Iterable[Sequence[Any]]) -> None:
        for found in non_finite:
            self._non_finite.take_up(NonFinite(*found))
        for module, tensors, values in statistics:
            self._modules.add(module, tensors, torch.tensor(values, dtype=torch.float64))

    def _record(self, plan: ShardPlan, extents: list[Extent]) -> None:
        found = [astuple(each) for each in self._non_finite.found() if each.name in plan.offsets]
        notes = {_STATISTICS: self._statistics.pop(plan.path, []), _NON_FINITE: found}
        self._folder.record(plan, extents, notes)


class _ModuleStatistics:
    """Adds up what was measured on the tensors of each module."""

    def __init__(self, tensors: Iterable[PlannedTensor], on_layer: Callable[[str, Tensor], None]) -> None:
        self._left = Counter(each.assignment.name for each in tensors if isinstance(each, QuantizedTensor))
        self._sums = {name: new_statistics() for name in self._left}
        self._on_layer = on_layer
        self._lock = threading.Lock()

    def add(self, module: str, tensors: int, statistics: Tensor) -> None:
        """So many more tensors of a module are complete."""
        with self._lock:
            merge(self._sums[module], statistics)
            self._left[module] -= tensors
            last = self._left[module] == 0
        if last:
            self._on_layer(module, self._sums.pop(module))


def _kind(tensor: QuantizedTensor) -> Hashable:
    """What tensors that are quantized and written together have in common, such as the up projections of all experts.

    An empty one, and one that holds all experts already, stands for itself.
    """
    alone = tensor.entry.name if tensor.layout.experts is not None or tensor.entry.nbytes == 0 else ""
    pattern = _NUMBER.sub("*", tensor.entry.name)
    return alone, pattern, tensor.assignment.name, tensor.layout, id(tensor.scheme), id(tensor.weight)


def _of_expert(span: Span, parameter: str, expert: int) -> Span:
    return span._replace(parameter=parameter, region=span.region._replace(expert=expert))
