"""What becomes of every checkpoint tensor in a conversion: quantized under its own name, or kept."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..checkpoint.headers import TensorEntry
from ..checkpoint.writer import TensorSpec
from ..geometry.layout import WeightLayout
from ..geometry.regions import Region
from ..geometry.spans import Span
from ..kernels.formats import WeightFormat
from ..model.attach import WeightLoaders
from ..model.leftovers import some
from ..model.routes import CheckpointTensor, Routes
from ..model.skeleton import Assignment
from ..online.weight_loader import DirectWeightLoader
from ..schemes.base import LinearScheme, MoEScheme
from ..schemes.exported.registry import exported_weight, why_not_columns
from ..schemes.exported.weights import ExportedWeight, ExportFormat
from ..schemes.stored.weights import StoredWeight
from .refusals import impossible, nothing_quantized

logger = logging.getLogger("quantload")
_NAME = "weight"
_SUFFIX = f".{_NAME}"


@dataclass(frozen=True)
class QuantizedTensor:
    """A checkpoint tensor that is quantized, for the module of `assignment`.

    The names of what is written for it begin with `stem`. `spans` say where its elements go in `layout`.
    """

    entry: CheckpointTensor
    stem: str
    assignment: Assignment
    scheme: LinearScheme | MoEScheme
    layout: WeightLayout
    weight: ExportedWeight
    spans: tuple[Span, ...]

    @property
    def module(self) -> str:
        """The name of the module in the checkpoint."""
        return self.stem.removesuffix(".")

    def specs(self) -> list[TensorSpec]:
        """The tensors that are written for it."""
        return list(self.weight.specs(self.stem, self.layout))


@dataclass(frozen=True)
class KeptTensor:
    """A checkpoint tensor that is copied."""

    entry: TensorEntry

    def specs(self) -> list[TensorSpec]:
        """The tensor itself."""
        return [TensorSpec(self.entry.name, self.entry.dtype, self.entry.shape)]

    @property
    def spans(self) -> tuple[Span, ...]:
        """Its bytes, one after the other."""
        nbytes = self.entry.nbytes
        return (Span(self.entry.name, Region(None, (0, 1), (0, nbytes)), 0, nbytes, 1),)


def plan_tensors(
    tensors: Mapping[str, CheckpointTensor],
    routes: Routes,
    loaders: WeightLoaders,
    assignments: Sequence[Assignment],
    export: ExportFormat,
) -> list[QuantizedTensor | KeptTensor]:
    """What becomes of all tensors of a checkpoint, in the order of files and offsets.

    A weight that is stored quantized is one tensor here, which can only be quantized anew. What the model does not know
    is copied, but for such weights: they are left out with a warning, as the new config says nothing of their codes.
    Raises `PolicyError` naming all modules whose weights the format cannot hold as the checkpoint stores them, for a
    scheme the format has no weights for, and where nothing is quantized.
    """
    sinks = loaders.sinks
    by_name = {assignment.name: assignment for assignment in assignments}
    whole = [each.target for each in routes.whole if each.target in sinks and sinks[each.target].values_dtype is None]
    problems = {target.rpartition(".")[0]: "its weights cannot be quantized one by one" for target in whole}
    anew: dict[str, str] = {}
    planned: list[QuantizedTensor | KeptTensor] = []
    why_not = _WhyNot(loaders, export)
    for entry in _to_write(tensors, routes):
        spans = [span for span in routes.spans.get(entry.name, ()) if sinks[span.parameter].values_dtype is None]
        if isinstance(entry, StoredWeight):
            why = _why_not_anew(entry, spans, routes, loaders)
            if why:
                anew.setdefault(entry.name.removesuffix(_SUFFIX), why)
                continue
        elif not spans:
            planned.append(KeptTensor(entry))
            continue
        owners = [by_name.get(span.parameter.rpartition(".")[0]) for span in routes.spans[entry.name]]
        assignment = next(each for each in owners if each is not None and each.scheme is not None)
        scheme = assignment.scheme
        assert scheme is not None
        weight = exported_weight(scheme, export)
        if all(each is not None and each.scheme is scheme for each in owners):
            why = _why_not_fused(entry, assignment, scheme, export) if weight.fused else why_not(entry, spans, scheme)
        else:
            why = "is one tensor for several modules, which get different schemes"
        if why:
            found = anew if isinstance(entry, StoredWeight) else problems
            found.setdefault(assignment.name, f"checkpoint tensor {entry.name} {list(entry.shape)} {why}")
        else:
            planned.append(
                _fused(entry, spans, assignment, scheme, weight)
                if weight.fused
                else _matrix(entry, assignment, scheme, weight)
            )
    if problems or anew:
        raise impossible(problems, anew, export)
    if not any(isinstance(tensor, QuantizedTensor) for tensor in planned):
        raise nothing_quantized(assignments)
    return planned


def _to_write(tensors: Mapping[str, CheckpointTensor], routes: Routes) -> list[CheckpointTensor]:
    """All but weights that are stored quantized and go nowhere in the model, in the order of files and offsets."""
    unknown = [name for name, entry in tensors.items() if isinstance(entry, StoredWeight) and name not in routes.spans]
    if unknown:
        logger.warning(
            "%d weights that are stored quantized and that the model does not know are not written: %s",
            len(unknown),
            some(unknown),
        )
    left_out = {*unknown}
    written = (entry for name, entry in tensors.items() if name not in left_out)
    return sorted(written, key=lambda entry: (entry.shard, entry.offset))


def _why_not_anew(weight: StoredWeight, spans: Sequence[Span], routes: Routes, loaders: WeightLoaders) -> str:
    """Why a weight that is stored quantized cannot be quantized anew; nothing if it can."""
    if len(spans) < len(routes.spans.get(weight.name, ())) or not spans:
        return f"is stored as {weight.format.name} and belongs to a module that cannot be quantized"
    if any(span.parameter in loaders.as_is for span in spans):
        return f"would stay {weight.format.name}, as the checkpoint stores it"
    return ""


class _WhyNot:
    """Why a checkpoint tensor cannot become a quantized weight under its own name; nothing if it can.

    Experts that go to the same rows and columns differ in nothing, and are looked at once.
    """

    def __init__(self, loaders: WeightLoaders, export: ExportFormat) -> None:
        self._loaders, self._export = loaders, export
        self._known: dict[Hashable, str] = {}

    def __call__(self, entry: CheckpointTensor, spans: Sequence[Span], scheme: LinearScheme | MoEScheme) -> str:
        where = [(span.parameter, span.region.rows, span.region.columns, *span[2:]) for span in spans]
        key = entry.shape, entry.name.endswith(_SUFFIX), id(scheme), *where
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._look(entry, spans, scheme)
        return known

    def _look(self, entry: CheckpointTensor, spans: Sequence[Span], scheme: LinearScheme | MoEScheme) -> str:
        if len(entry.shape) == 3:
            return "holds all experts of a layer, which only the format mxfp4 has a place for, and only for gpt-oss"
        if len(entry.shape) != 2 or not entry.name.endswith(_SUFFIX):
            return "is not the matrix of one linear layer or one expert"
        rows, columns = entry.shape
        if any(span.column_stride != 1 or span.row_stride % columns or span.offset % columns for span in spans):
            return "is stored transposed, or its columns are taken apart"
        if why := why_not_columns(scheme, columns, self._export):
            return why
        layout = _layout(scheme.kernels.format, rows, columns)
        for span in spans:
            there = self._loaders.landing(span.parameter).layout
            if there is None or not (there.whole(span.region) and layout.whole(_rows_of(span, columns))):
                return f"is scaled together with other tensors, or in parts, by {scheme.name}"
        return ""


def _why_not_fused(
    entry: CheckpointTensor, assignment: Assignment, scheme: LinearScheme | MoEScheme, export: ExportFormat
) -> str:
    """Why a checkpoint tensor cannot become the quantized weights of all experts; nothing if it can."""
    module: Any = assignment.module
    if assignment.kind != "experts" or len(entry.shape) != 3 or not module.is_transposed or module.is_concatenated:
        return "is not the weight of all experts of a layer as gpt-oss stores it"
    return why_not_columns(scheme, entry.shape[1], export)


def _matrix(
    entry: CheckpointTensor, assignment: Assignment, scheme: LinearScheme | MoEScheme, weight: ExportedWeight
) -> QuantizedTensor:
    rows, columns = entry.shape
    layout = _layout(scheme.kernels.format, rows, columns)
    spans = (Span(entry.name, Region(None, (0, rows), (0, columns)), 0, columns, 1),)
    return QuantizedTensor(entry, entry.name.removesuffix(_NAME), assignment, scheme, layout, weight, spans)


@lru_cache(maxsize=256)
def _layout(fmt: WeightFormat, rows: int, columns: int) -> WeightLayout:
    """The layout of a matrix: the same for thousands of experts."""
    return WeightLayout(fmt, None, (("", rows),), columns)


def _fused(
    entry: CheckpointTensor,
    spans: Sequence[Span],
    assignment: Assignment,
    scheme: LinearScheme | MoEScheme,
    weight: ExportedWeight,
) -> QuantizedTensor:
    experts, columns, rows = entry.shape
    layout = WeightLayout(scheme.kernels.format, experts, (("", rows),), columns)
    own = tuple(span._replace(parameter=entry.name) for span in spans)
    return QuantizedTensor(entry, entry.name, assignment, scheme, layout, weight, own)


def _rows_of(span: Span, columns: int) -> Region:
    """The rows of the checkpoint tensor a span takes, from the first to the last."""
    first = span.offset // columns
    count = (span.region.rows[1] - span.region.rows[0] - 1) * span.row_stride // columns + 1
    return Region(None, (first, first + count), (0, columns))


def to_buffers(routes: Routes, loaders: WeightLoaders) -> set[str]:
    """Checkpoint tensors that are buffers of the model, such as masks."""
    buffers = {name for name, sink in loaders.sinks.items() if isinstance(sink, DirectWeightLoader) and sink.is_buffer}
    return {name for name, spans in routes.spans.items() if all(span.parameter in buffers for span in spans)}
