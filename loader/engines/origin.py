"""Lazy tensors of the files of a checkpoint, and what is to be read of them for whom.

What an engine copies into a tensor of its own is there when its copy returns. What it hands to a closure that quantizes
may come later: reads of a checkpoint wait for the rest of their layer, so that they follow the order of the files and
all that decides a scale is read together. `flush` brings what is still waiting.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry, file_order
from ..checkpoint.index import CheckpointIndex
from ..checkpoint.pieces import Piece
from ..checkpoint.reader import PieceReader, ReadTotals
from ..checkpoint.source import Source
from ..checkpoint.working_memory import slots_per_worker
from ..errors import UnsupportedCheckpointError
from ..geometry.spans import Span
from ..model.boxes import as_matrix, region_of
from ..online.as_stored import StoredCodesLoader
from ..online.non_finite import NonFiniteValues
from ..online.sink import Sink
from ..options import LoadOptions
from ..pieces.decoded import Dequantize
from ..pieces.plain import plan_pieces
from ..pieces.stored import plan_stored
from ..plan import plan_staging
from ..schemes.stored.weights import StoredCheckpoint, StoredWeight
from .arrivals import Arrivals, incomplete
from .lazy import EngineSink, LazyTensor, shape_of
from .rank_maxima import expect_maxima, is_scaled_across_ranks
from .view_sink import ViewSink

Entry = TensorEntry | StoredWeight
"""A tensor of a checkpoint, or several that stand for a quantized one."""
READ_AT_ONCE = 256 << 20
"""Bytes that wait at most before they are read, where the layer is not at its end."""


class Materialized(NamedTuple):
    """A tensor that was read whole, because an engine does more with it than moving elements."""

    why: str
    shape: tuple[int, ...]
    nbytes: int


def _no_codes(format_name: str) -> Dequantize:
    raise LookupError(f"no kernel was given that decodes {format_name}")


@dataclass
class OriginTotals:
    """What an origin has read so far."""

    read: ReadTotals = field(default_factory=lambda: ReadTotals(0, 0.0, 0))
    runs: int = 0
    materialized: list[Materialized] = field(default_factory=list)
    as_values: set[str] = field(default_factory=set)
    """What is stored quantized, and went to tensors that hold values."""


class CheckpointOrigin:
    """The tensors of a checkpoint as lazy tensors, read with the reader of a load; safe to use from several threads.

    A context manager: inside, its buffers and open files stay from one read to the next. `on_bytes` gets the bytes read
    so far. With `immediate`, what is handed to closures is read at once, too: for engines that copy what closures wrote
    away before they ask for the next tensor. Of a quantized checkpoint, `stored`, the tensors are those that its codes
    stand for, which are decoded as they are read, by the kernels that `dequantizer` gives for the names of formats.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        source: Source,
        options: LoadOptions,
        device: torch.device,
        *,
        on_bytes: Callable[[int], None] | None = None,
        immediate: bool = False,
        stored: StoredCheckpoint | None = None,
        dequantizer: Callable[[str], Dequantize] = _no_codes,
    ) -> None:
        self.totals = OriginTotals()
        self.non_finite = NonFiniteValues(options.strict)
        """What was found in weights that keep their values."""
        self.immediate = immediate
        self._index, self._source, self._options, self._device = index, source, options, device
        self._on_bytes = on_bytes
        tensors: Mapping[str, Entry] = index.tensors if stored is None else stored.entries
        self._entries = sorted(tensors.values(), key=file_order)
        self._by_name, self._dequantizer = tensors, dequantizer
        self._reader: PieceReader | None = None
        self._chunk_bytes = 0
        self._reading = threading.RLock()
        self._waiting = _Waiting()
        self._arrivals = Arrivals(options.chunk_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._waiting.forget()
        with self._reading:
            self._close_reader()

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every tensor by name, in the order of files and offsets; what was asked for meanwhile is read between them.

        After the last one everything that was asked for is there, but for what belongs to something that was not yet,
        as an engine may ask from several threads, and what other ranks decide the scales of. `flush` is the end.
        """
        layer = ""
        for number, entry in enumerate(self._entries):
            own = layer_of(entry.name)
            if own != layer or self._waiting.nbytes > READ_AT_ONCE:
                self._read_waiting()
            layer = own
            yield entry.name, self._lazy(number, entry)
        self._read_waiting()

    def flush(self) -> None:
        """Read all that was asked for, also what other ranks decide the scales of; all of them have to flush alike.

        Raises `MissingWeightsError` where a part of what decides its scales is not there.
        """
        self._read_waiting(with_other_ranks=True)
        self._waiting.check_nothing_left()
        self._arrivals.flush()

    def deliver(self, source: int, span: Span, sink: EngineSink) -> None:
        """Bring a span of a source to a closure: later, or at once if reads are `immediate`."""
        entry = self._entries[source]
        if isinstance(sink, StoredCodesLoader):
            _check_stored_alike(entry, sink)
        self._waiting.add(entry, span, sink)
        if self.immediate:
            self._read_waiting()

    def write(self, target: Tensor, source: LazyTensor) -> None:
        """Read what a lazy tensor stands for into `target`, now."""
        matrix = _as_matrix(target)
        if matrix is None:
            self._write_parts(target, source)
            return
        spans: dict[str, list[Span]] = defaultdict(list)
        sinks: dict[str, Sink] = {}
        shape = shape_of(source)
        for box in itertools.chain.from_iterable(as_matrix(box, shape) for box in source.boxes):
            entry = self._entries[box.source]
            if isinstance(entry, StoredWeight):
                self.totals.as_values.add(entry.name)
            sinks.setdefault(entry.name, ViewSink(entry.name, matrix, self.non_finite))
            spans[entry.name].append(Span(entry.name, region_of(box), box.offset, *box.strides))
        with self._reading:
            self._read(spans, sinks)

    def read(self, source: LazyTensor, why: str) -> Tensor:
        """What a lazy tensor stands for, in memory."""
        tensor = torch.empty(shape_of(source), dtype=source.dtype)
        self.totals.materialized.append(Materialized(why, tuple(tensor.shape), tensor.nbytes))
        self.write(tensor, source)
        return tensor

    def file_of(self, name: str) -> str:
        """The file that a tensor is in, or the codes that stand for it."""
        return self._index.shards[self._by_name[name].shard].path

    def _lazy(self, number: int, entry: Entry) -> LazyTensor:
        strides = entry.strides if isinstance(entry, StoredWeight) else None
        return LazyTensor.of_source(self, number, entry.shape, entry.dtype, self._arrivals.wrap, strides)

    def _write_parts(self, target: Tensor, source: LazyTensor) -> None:
        """Into a target that is no matrix in memory: one index of its first dimension after the other."""
        for index in range(target.shape[0]):
            self.write(target[index], source.part(index))

    def _read_waiting(self, with_other_ranks: bool = False) -> None:
        with self._reading:  # so that what another thread has taken is there when this returns, too
            spans, sinks = self._waiting.take_ready(with_other_ranks)
            self._read(spans, sinks)

    def _read(self, spans: dict[str, list[Span]], sinks: dict[str, Sink]) -> None:
        if not spans:
            return
        pieces, largest = self._plan(spans, sinks)
        run = self._reader_for(largest).run(pieces)
        before = self.totals.read
        self.totals.read = ReadTotals(
            before.bytes_read + run.bytes_read,
            before.seconds + run.seconds,
            max(before.staging_peak_bytes, run.staging_peak_bytes),
        )
        self.totals.runs += 1
        if self._on_bytes is not None:
            self._on_bytes(self.totals.read.bytes_read)

    def _plan(self, spans: dict[str, list[Span]], sinks: dict[str, Sink]) -> tuple[list[Piece], int]:
        """What is read, and the size of the largest buffer that it takes."""
        entries = sorted((self._by_name[name] for name in spans), key=file_order)
        limit = self._options.chunk_bytes
        plain = plan_pieces([entry for entry in entries if isinstance(entry, TensorEntry)], spans, sinks, limit)
        weights = [entry for entry in entries if isinstance(entry, StoredWeight)]
        as_is = {
            name: sink.progress.by_role(sink.parameter)
            for name, sink in sinks.items()
            if isinstance(sink, StoredCodesLoader)
        }
        decoded = plan_stored(weights, spans, sinks, as_is, limit, self._dequantizer)
        expect_maxima([*plain.observed, *decoded.observed], sinks)
        pieces = [*plain.pieces, *decoded.pieces]
        buffers = (piece.nbytes for piece in pieces if piece.target is None)
        return pieces, max(decoded.scratch_bytes, max(buffers, default=0))

    def _reader_for(self, nbytes: int) -> PieceReader:
        """A reader whose buffers hold pieces of so many bytes: scale blocks that are larger than a chunk need more."""
        if self._reader is None or nbytes > self._chunk_bytes:
            self._close_reader()
            self._chunk_bytes = max(nbytes, self._options.chunk_bytes)
            buffers = slots_per_worker(self._device)
            workers, staging = plan_staging(self._options, self._chunk_bytes, self._options.worker_count(), buffers)
            reader = PieceReader(
                self._source,
                self._index.shards,
                workers=workers,
                chunk_bytes=self._chunk_bytes,
                staging_bytes=staging,
                device=self._device,
            )
            self._reader = reader.__enter__()
        return self._reader

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.__exit__()
            self._reader = None


class _Wanted(NamedTuple):
    """A span that a closure waits for, and what it waits with: None for nothing."""

    entry: Entry
    span: Span
    sink: EngineSink
    group: Hashable


class _Waiting:
    """Spans for closures that are not read yet."""

    def __init__(self) -> None:
        self.nbytes = 0
        """Bytes that can be read."""
        self._wanted: list[_Wanted] = []
        self._seen: dict[Hashable, int] = defaultdict(int)
        self._lock = threading.Lock()

    def add(self, entry: Entry, span: Span, sink: EngineSink) -> None:
        local = sink.scales_are_local(span.region)
        group: Hashable = None if local else sink.scale_group(span.region.expert)
        with self._lock:
            if not local:
                self._seen[group] += span.region.numel
            self._wanted.append(_Wanted(entry, span, sink, group))
            self.nbytes += span.region.numel * entry.dtype.itemsize

    def take_ready(self, with_other_ranks: bool) -> tuple[dict[str, list[Span]], dict[str, Sink]]:
        """Spans by checkpoint tensor, and sinks by parameter, of all that has to wait for nothing else.

        What other ranks decide the scales of is among them only where that is asked for.
        """
        spans: dict[str, list[Span]] = defaultdict(list)
        sinks: dict[str, Sink] = {}
        left = []
        with self._lock:
            for wanted in self._wanted:
                if self._is_ready(wanted) and (with_other_ranks or not is_scaled_across_ranks(wanted.sink)):
                    spans[wanted.entry.name].append(wanted.span)
                    sinks[wanted.span.parameter] = wanted.sink
                else:
                    left.append(wanted)
            for group in set(self._seen) - {wanted.group for wanted in left}:
                del self._seen[group]
            self._wanted, self.nbytes = left, 0
        return spans, sinks

    def forget(self) -> None:
        """Nothing waits any more."""
        with self._lock:
            self._wanted, self.nbytes = [], 0
            self._seen.clear()

    def check_nothing_left(self) -> None:
        """Raise `MissingWeightsError` for what will not be read because something that belongs to it never came.

        What another thread has asked for meanwhile, and can be read, is for the next time.
        """
        with self._lock:
            names = sorted({wanted.sink.name for wanted in self._wanted if not self._is_ready(wanted)})
        if names:
            raise incomplete(names)

    def _is_ready(self, wanted: _Wanted) -> bool:
        return wanted.group is None or self._seen[wanted.group] >= wanted.sink.parameter.scaled_together


def _check_stored_alike(entry: Entry, sink: StoredCodesLoader) -> None:
    """Raise `UnsupportedCheckpointError` where a layer stays as stored, and this checkpoint stores it otherwise."""
    wanted = sink.parameter.layout.format.name
    found = entry.format.name if isinstance(entry, StoredWeight) else str(entry.dtype)
    if found != wanted:
        raise UnsupportedCheckpointError(
            f"{sink.name} is in {wanted}, as the checkpoint stores it that it was made for, and {entry.name} is "
            f"{found}: name a scheme to have either quantized anew"
        )


def layer_of(name: str) -> str:
    """The part of a tensor's name up to the number of its layer: `model.layers.3`; nothing without a number."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return ""


def _as_matrix(target: Tensor) -> Tensor | None:
    """A view [product of the others, last] of a tensor; `None` where its strides allow none."""
    if target.dim() == 2:
        return target
    if target.dim() < 2:
        return target.reshape(1, -1) if target.dim() == 0 else target.unsqueeze(0)
    try:
        return target.view(-1, target.shape[-1])
    except RuntimeError:
        return None
