"""What a load would do, before it does it: modules, pieces, and the memory they will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from .checkpoint.arena import rounded_slot
from .checkpoint.files import Fetches
from .checkpoint.headers import TensorEntry, file_order
from .checkpoint.index import CheckpointIndex, Shard
from .checkpoint.pieces import Piece, plan_batches
from .checkpoint.source import Reads
from .checkpoint.working_memory import slots_per_worker
from .errors import PolicyError, UnsupportedCheckpointError
from .memory.amounts import typed_bytes
from .memory.overhead import CONFIG_VALUES, PIECES, READ_AT_ONCE, TENSORS
from .memory.planner import SLACK_BYTES, MemoryPlan, ParameterSize, plan_memory
from .model import transformers_api
from .model.attach import WeightLoaders
from .model.leftovers import Leftovers
from .model.routes import CheckpointMap, Routes
from .model.skeleton import Assignment
from .model.stored_sources import StoredSources
from .model.unexplained_codes import VALUES, explained_within, unexplained
from .options import LoadOptions
from .pieces.plain import plan_pieces
from .pieces.stored import plan_stored
from .pieces.whole import AT_ONCE, plan_whole, whole_bytes
from .schemes.registry import SchemeFactory
from .schemes.stored.weights import StoredWeight

QUANTIZABLE = (torch.bfloat16, torch.float16, torch.float32)
MIN_CHUNK = 4096


@dataclass(frozen=True)
class LoadPlan:
    """The pieces of a load in the order they are read, and its predicted memory.

    `chunk_bytes` is the size of a staging buffer: the largest piece, at most the option's unless a scale block is
    larger. `bytes_in` are the checkpoint bytes of each linear and experts module, `leftovers` what is not loaded,
    `final_sizes` says how many final tensors of each size in bytes the pieces fill, `observed` which matrices are read
    twice, in the order in which their first passes end.
    """

    pieces: list[Piece]
    chunk_bytes: int
    workers: int
    memory: MemoryPlan
    bytes_total: int
    bytes_in: dict[str, int]
    whole_conversions: int
    leftovers: Leftovers
    final_sizes: Mapping[int, int] = field(default_factory=dict)
    observed: Sequence[Hashable] = ()
    fetches: Fetches | None = None
    """What will be asked of a server, if the checkpoint is read from one."""

    def reads(self, shards: Sequence[Shard]) -> Iterator[Reads]:
        """What is read, batch by batch."""
        for batch in plan_batches(self.pieces, rounded_slot(self.chunk_bytes)):
            yield shards[batch.shard].path, batch.reads

    def beside(self, buffer_bytes: int, library_bytes: int) -> LoadPlan:
        """The same plan where a source has buffers of its own, and uses a library that takes so many bytes."""
        memory = replace(
            self.memory,
            staging_bytes=self.memory.staging_bytes + buffer_bytes,
            slack_bytes=self.memory.slack_bytes + library_bytes,
            peak_bytes=self.memory.peak_bytes + buffer_bytes + library_bytes,
        )
        return replace(self, memory=memory)


def plan_load(
    model: PreTrainedModel,
    index: CheckpointIndex,
    mapped: CheckpointMap,
    sources: StoredSources,
    routes: Routes,
    loaders: WeightLoaders,
    assignments: list[Assignment],
    options: LoadOptions,
    schemes: SchemeFactory,
) -> LoadPlan:
    """Cut every route into pieces and add up what will be held at once."""
    entries, weights = _expected(index, sources, routes, loaders, schemes)
    plain = plan_pieces(entries, routes.spans, loaders.sinks, options.chunk_bytes)
    pieces = [
        *plain.pieces,
        *plan_whole(routes.whole, index.tensors, mapped.shapes, loaders.sinks, loaders.landing),
    ]
    stored = plan_stored(weights, routes.spans, loaders.sinks, loaders.as_is, options.chunk_bytes, schemes.dequantizer)
    pieces += stored.pieces
    chunk = max((piece.nbytes for piece in pieces if piece.target is None), default=MIN_CHUNK)
    chunk = max(chunk, stored.scratch_bytes, min(options.chunk_bytes, 1 << 20))
    workers, staging = plan_staging(options, chunk, len(pieces), slots_per_worker(schemes.device))
    whole = AT_ONCE * max((whole_bytes(conversion, index.tensors, mapped) for conversion in routes.whole), default=0)
    bytes_in = dict(_bytes_in(mapped, assignments, sources))
    held = whole + (workers + 1) * stored.held_bytes + max(plain.maxima_bytes, stored.maxima_bytes)
    memory = _memory(model, index, mapped, sources, loaders, assignments, staging, held, len(pieces))
    total = sum(piece.nbytes for piece in pieces)
    sizes = Counter(size for name in loaded_parameters(mapped, loaders) for size in loaders.sinks[name].sizes)
    observed = [*plain.observed, *stored.observed]
    return LoadPlan(
        *(pieces, chunk, workers, memory, total, bytes_in, len(routes.whole), mapped.leftovers, sizes, observed)
    )


def plan_without_pieces(
    model: PreTrainedModel,
    index: CheckpointIndex,
    mapped: CheckpointMap,
    sources: StoredSources,
    routes: Routes,
    loaders: WeightLoaders,
    assignments: list[Assignment],
    options: LoadOptions,
    schemes: SchemeFactory,
) -> LoadPlan:
    """What `plan_load` checks and adds up, for who reads the same tensors in pieces of their own."""
    _, weights = _expected(index, sources, routes, loaders, schemes)
    for name in {weight.format.name for weight in weights if not _stays(weight, routes, loaders)}:
        schemes.dequantizer(name)  # that it is there, and compiled in time
    memory = _memory(model, index, mapped, sources, loaders, assignments, staging=0, held=0, pieces=0)
    bytes_in = dict(_bytes_in(mapped, assignments, sources))
    return LoadPlan([], MIN_CHUNK, 1, memory, 0, bytes_in, len(routes.whole), mapped.leftovers)


def _memory(
    model: PreTrainedModel,
    index: CheckpointIndex,
    mapped: CheckpointMap,
    sources: StoredSources,
    loaders: WeightLoaders,
    assignments: list[Assignment],
    staging: int,
    held: int,
    pieces: int,
) -> MemoryPlan:
    """The memory of a load with an arena of `staging` bytes, `held` bytes beside it and so many pieces."""
    return plan_memory(
        _sizes(mapped, loaders, assignments, sources),
        sum(buffer.nbytes for buffer in _unrouted(model, loaders, mapped)),
        staging,
        transient_bytes=held,
        overhead_bytes=SLACK_BYTES
        + TENSORS.beyond(len(index.tensors))
        + PIECES.beyond(pieces)
        + CONFIG_VALUES.beyond(index.config_values)
        + READ_AT_ONCE.beyond(index.read_at_once),
        checkpoint_bytes=index.total_bytes,
    )


def _stays(weight: StoredWeight, routes: Routes, loaders: WeightLoaders) -> bool:
    """Whether a weight is kept as it is stored."""
    return all(span.parameter in loaders.as_is for span in routes.spans[weight.name])


def _expected(
    index: CheckpointIndex,
    sources: StoredSources,
    routes: Routes,
    loaders: WeightLoaders,
    schemes: SchemeFactory,
) -> tuple[list[TensorEntry], list[StoredWeight]]:
    """Plain tensors and stored weights in the order of files and offsets, checked; `schemes` learn of their dtypes."""
    _check_whole(routes, sources, index, loaders)
    whole_names = {name for conversion in routes.whole for name in conversion.names()}
    plain = (index.tensors[name] for name in routes.spans if name not in whole_names and name not in sources.weights)
    entries = sorted(plain, key=file_order)
    _check_dtypes(entries, routes, loaders)
    for dtype in _quantized_dtypes(entries, routes, loaders):
        schemes.expect(dtype)
    weights = sorted((sources.weights[name] for name in routes.spans if name in sources.weights), key=file_order)
    return entries, weights


def plan_staging(options: LoadOptions, chunk: int, pieces: int, buffers: int) -> tuple[int, int]:
    """Workers, and bytes of the arena: so many buffers each, and never more than they can use."""
    workers, each = min(options.worker_count(), max(pieces, 1)), buffers * rounded_slot(chunk)
    if options.staging_bytes is None:
        return workers, workers * each
    if options.staging_bytes < each:
        given, needed, size = typed_bytes(options.staging_bytes), typed_bytes(each), typed_bytes(chunk)
        raise PolicyError(
            f"staging is {given}; one worker needs {buffers} buffers of {size}: give it {needed}"
            f"{_instead_of_staging(options, chunk, options.staging_bytes // buffers)}"
        )
    workers = min(workers, options.staging_bytes // each)
    return workers, workers * each


def _instead_of_staging(options: LoadOptions, chunk: int, available: int) -> str:
    """What helps other than more staging where a buffer can have `available` bytes, or why nothing does."""
    if chunk > options.chunk_bytes:
        return f"; scale blocks cannot be cut, so a chunk of {typed_bytes(options.chunk_bytes)} changes nothing"
    fitting = available // rounded_slot(1) * rounded_slot(1)
    return f", or a chunk of at most {typed_bytes(fitting)}" if fitting >= MIN_CHUNK else ""


def _check_whole(routes: Routes, sources: StoredSources, index: CheckpointIndex, loaders: WeightLoaders) -> None:
    for conversion in routes.whole:
        explained = explained_within(conversion)
        for name in conversion.names():
            if name in sources.weights:
                raise UnsupportedCheckpointError(
                    f"{name} is stored quantized, and transformers computes {conversion.target} from values, not by "
                    f"moving them: load the checkpoint this one was made from"
                )
            if name not in explained:
                _check_values(index.tensors[name], conversion.target, loaders)


def _check_dtypes(entries: list[TensorEntry], routes: Routes, loaders: WeightLoaders) -> None:
    """Raise for tensors that are no values of the parameters they go to; one that is of its dtype may be anything."""
    for entry in entries:
        if entry.dtype not in QUANTIZABLE:
            for span in routes.spans[entry.name]:
                _check_dtype(entry, span.parameter, loaders)


def _check_dtype(entry: TensorEntry, parameter: str, loaders: WeightLoaders) -> None:
    _check_values(entry, parameter, loaders)
    if entry.dtype == torch.float64 and _kept_as(parameter, loaders) is None:
        raise UnsupportedCheckpointError(
            f"checkpoint tensor {entry.name} is {entry.dtype}; only "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in QUANTIZABLE)} can be quantized: "
            f"leave {parameter.rpartition('.')[0]} as stored with an ignore pattern"
        )


def _check_values(entry: TensorEntry, parameter: str, loaders: WeightLoaders) -> None:
    """Raise `CheckpointError` for codes that no config explains, where a parameter is made of values."""
    kept_as = _kept_as(parameter, loaders)
    if entry.dtype in (*VALUES, kept_as) or not (kept_as is None or kept_as.is_floating_point):
        return
    if parameter in loaders.whole_numbers:
        return
    raise unexplained(entry, parameter)


def _kept_as(parameter: str, loaders: WeightLoaders) -> torch.dtype | None:
    """The dtype that a parameter has in the model; `None` for one that is quantized."""
    return loaders.sinks[parameter].values_dtype


def _quantized_dtypes(entries: list[TensorEntry], routes: Routes, loaders: WeightLoaders) -> Iterator[torch.dtype]:
    """The dtypes of the tensors that are quantized."""
    for dtype in {entry.dtype for entry in entries}:
        names = (entry.name for entry in entries if entry.dtype == dtype)
        if any(loaders.sinks[span.parameter].values_dtype is None for name in names for span in routes.spans[name]):
            yield dtype


def _sizes(
    mapped: CheckpointMap, loaders: WeightLoaders, assignments: list[Assignment], sources: StoredSources
) -> Iterator[ParameterSize]:
    kinds = {assignment.name: assignment for assignment in assignments}
    for name in loaded_parameters(mapped, loaders):
        sink = loaders.sinks[name]
        assignment = kinds.get(name.rpartition(".")[0])
        kind = assignment.kind if assignment is not None else "other"
        unquantized = mapped.shapes.tensors[name]
        bytes_in = sum(weight.nbytes for weight in sources.of(name)) or unquantized.nbytes
        scheme = assignment.scheme if assignment is not None and sink.values_dtype is None else None
        yield ParameterSize(name, kind, "none" if scheme is None else scheme.name, bytes_in, sum(sink.sizes))


def loaded_parameters(mapped: CheckpointMap, loaders: WeightLoaders) -> list[str]:
    """Parameters the checkpoint has tensors for."""
    return [name for name in mapped.shapes.tensors if name not in mapped.missing and name in loaders.sinks]


def _unrouted(model: PreTrainedModel, loaders: WeightLoaders, mapped: CheckpointMap) -> Iterator[torch.Tensor]:
    """Non-persistent buffers, and what is initialized because the model class allows it to be missing."""
    tied = transformers_api.tied_names(model)
    persistent: Mapping[str, object] = model.state_dict()
    for name, buffer in model.named_buffers():
        if name not in persistent:
            yield buffer
    for name in mapped.missing - tied:
        if name in loaders.sinks:
            yield loaders.params[name]


def _bytes_in(
    mapped: CheckpointMap, assignments: list[Assignment], sources: StoredSources
) -> Iterator[tuple[str, int]]:
    for assignment in assignments:
        layouts = {} if assignment.scheme is None else assignment.scheme.layouts(assignment.module)
        names = [f"{assignment.name}.{name}" for name in layouts]
        stored = sum(weight.nbytes for name in names for weight in sources.of(name))
        itemsizes = (
            mapped.coordinates[name][0].element_size()
            if name in mapped.coordinates
            else mapped.shapes.tensors[name].itemsize
            for name in names
        )
        yield (
            assignment.name,
            stored or sum(layout.numel * size for layout, size in zip(layouts.values(), itemsizes, strict=True)),
        )
