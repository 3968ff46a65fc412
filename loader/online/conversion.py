"""One conversion: the closure of every checkpoint tensor, the shards they write to, and what is finished when."""

from __future__ import annotations

import functools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.output import OutputFolder
from ..checkpoint.writer import Extent, ShardPlan, ShardWriter
from ..errors import MissingWeightsError
from ..kernels.statistics import merge, new_statistics
from ..model.routes import Source, Span
from ..schemes.exported.tensors import KeptTensor, QuantizedTensor
from ..schemes.stored.weights import StoredWeight
from .cuts import Sink
from .exporting import Buffers, CopyingLoader, ExportingLoader

PlannedTensor = QuantizedTensor | KeptTensor
_NAMES_SHOWN = 8
_STATISTICS = "statistics"


class Conversion:
    """Gives each tensor of the shards that are not finished yet its closure; use it as a context manager.

    A shard is recorded in `folder` with the statistics of its tensors, which those who take it up later report as if
    they had quantized it. `on_layer(module name, statistics)` runs once a module, in the thread that wrote its last
    piece.
    """

    def __init__(
        self,
        tensors: Sequence[PlannedTensor],
        shards: Sequence[ShardPlan],
        folder: OutputFolder,
        on_layer: Callable[[str, Tensor], None],
    ) -> None:
        self.entries: list[TensorEntry] = []
        self.stored: list[StoredWeight] = []
        self.spans: dict[str, list[Span]] = {}
        self.sinks: dict[str, Sink] = {}
        self._folder = folder
        self._modules = _ModuleStatistics(tensors, on_layer)
        self._writers: dict[str, ShardWriter] = {}
        self._statistics: dict[str, dict[str, list[float]]] = defaultdict(dict)
        self._buffers = Buffers()
        self._complete: list[Callable[[], None]] = []
        where = {name: plan for plan in shards for name in plan.offsets}
        members: dict[str, list[PlannedTensor]] = defaultdict(list)
        for tensor in tensors:
            members[where[tensor.specs()[0].name].path].append(tensor)
        for plan in shards:
            self._prepare(plan, members[plan.path])

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
        gaps = [gap for sink in self.sinks.values() for gap in sink.loader.missing()]
        if gaps:
            more = f" and {len(gaps) - _NAMES_SHOWN} more" if len(gaps) > _NAMES_SHOWN else ""
            raise MissingWeightsError(f"parts that were never written: {'; '.join(gaps[:_NAMES_SHOWN])}{more}")

    def _prepare(self, plan: ShardPlan, tensors: Iterable[PlannedTensor]) -> None:
        tensors = list(tensors)
        notes = self._folder.finished(plan)
        if notes is not None:
            self._complete.append(functools.partial(self._take_up, notes[_STATISTICS]))
            return
        writer = self._writers[plan.path] = ShardWriter(self._folder.files, plan, len(tensors), self._record)
        for tensor in tensors:
            self._attach(tensor, writer)

    def _attach(self, tensor: PlannedTensor, writer: ShardWriter) -> None:
        entry: Source = tensor.entry
        if isinstance(tensor, KeptTensor):
            # Its bytes, whatever they stand for: no kernel looks at them, and torch need not know the dtype.
            entry = tensor.entry._replace(dtype=torch.uint8, shape=(entry.nbytes,))
            loader: Any = CopyingLoader(entry.name, entry.nbytes, writer, writer.done)
        else:

            def written(statistics: Tensor | None) -> None:
                self._written(writer, tensor.entry.name, statistics)

            loader = ExportingLoader(tensor, writer, self._buffers, written)
        if entry.nbytes == 0:
            self._complete.append(loader.finish)
            return
        if isinstance(entry, StoredWeight):
            self.stored.append(entry)
        else:
            self.entries.append(entry)
        self.spans[entry.name] = list(tensor.spans)
        self.sinks[entry.name] = Sink(torch.empty(0), loader)

    def _take_up(self, statistics: Mapping[str, list[float]]) -> None:
        for name, values in statistics.items():
            self._modules.add(name, torch.tensor(values, dtype=torch.float64) if values else None)

    def _written(self, writer: ShardWriter, name: str, statistics: Tensor | None) -> None:
        self._statistics[writer.plan.path][name] = [] if statistics is None else statistics.tolist()
        self._modules.add(name, statistics)
        writer.done()

    def _record(self, plan: ShardPlan, extents: list[Extent]) -> None:
        self._folder.record(plan, extents, {_STATISTICS: self._statistics.pop(plan.path, {})})


class _ModuleStatistics:
    """Adds up what was measured on the tensors of each module."""

    def __init__(self, tensors: Iterable[PlannedTensor], on_layer: Callable[[str, Tensor], None]) -> None:
        quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
        self._module: Mapping[str, str] = {each.entry.name: each.assignment.name for each in quantized}
        self._left = Counter(self._module.values())
        self._sums = {name: new_statistics() for name in self._left}
        self._on_layer = on_layer
        self._lock = threading.Lock()

    def add(self, tensor: str, statistics: Tensor | None) -> None:
        """A tensor is complete."""
        module = self._module[tensor]
        with self._lock:
            if statistics is not None:
                merge(self._sums[module], statistics)
            self._left[module] -= 1
            last = self._left[module] == 0
        if last:
            self._on_layer(module, self._sums.pop(module))
