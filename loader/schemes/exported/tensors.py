"""What becomes of every checkpoint tensor in a conversion: quantized under its own name, or kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...checkpoint.headers import TensorEntry
from ...checkpoint.writer import TensorSpec
from ...errors import PolicyError
from ...model.routes import Routes, Span
from ...model.skeleton import Assignment
from ...online.cuts import Sink
from ...online.regions import Region
from ..base import LinearScheme, MoEScheme
from ..layout import WeightLayout
from ..policy import name_reason
from .registry import exported_weight
from .weights import ExportedWeight, ExportFormat

_SUFFIX = ".weight"
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class QuantizedTensor:
    """A checkpoint tensor that is quantized: for the module `assignment`, under the name `module` in the checkpoint."""

    entry: TensorEntry
    module: str
    assignment: Assignment
    scheme: LinearScheme | MoEScheme
    layout: WeightLayout
    weight: ExportedWeight

    def specs(self) -> list[TensorSpec]:
        """The tensors that are written for it."""
        return list(self.weight.specs(self.module, self.layout))

    def spans(self) -> list[Span]:
        """Where its elements go: to the matrix that is written."""
        rows, columns = self.layout.rows, self.layout.columns
        return [Span(self.entry.name, Region(None, (0, rows), (0, columns)), 0, columns, 1)]


@dataclass(frozen=True)
class KeptTensor:
    """A checkpoint tensor that is copied."""

    entry: TensorEntry

    def specs(self) -> list[TensorSpec]:
        """The tensor itself."""
        return [TensorSpec(self.entry.name, self.entry.dtype, self.entry.shape)]

    def spans(self) -> list[Span]:
        """Its bytes, one after the other."""
        nbytes = self.entry.nbytes
        return [Span(self.entry.name, Region(None, (0, 1), (0, nbytes)), 0, nbytes, 1)]


def plan_tensors(
    tensors: Mapping[str, TensorEntry],
    routes: Routes,
    sinks: Mapping[str, Sink],
    assignments: Iterable[Assignment],
    export: ExportFormat,
) -> list[QuantizedTensor | KeptTensor]:
    """What becomes of all tensors of a checkpoint, in the order of files and offsets.

    Raises `PolicyError` for a module whose weights the format cannot hold as the checkpoint stores them, and for a
    scheme the format has no weights for.
    """
    by_name = {assignment.name: assignment for assignment in assignments}
    for conversion in routes.whole:
        _refuse_whole(conversion.target, sinks)
    planned: list[QuantizedTensor | KeptTensor] = []
    for entry in sorted(tensors.values(), key=lambda entry: (entry.shard, entry.offset)):
        spans = routes.spans.get(entry.name, [])
        quantized = [span for span in spans if not sinks[span.parameter].direct]
        if not quantized:
            planned.append(KeptTensor(entry))
            continue
        owners = {span.parameter.rpartition(".")[0]: None for span in spans}
        found = [by_name[name] for name in owners if name in by_name]
        schemes = {id(assignment.scheme): assignment.scheme for assignment in found}
        if len(found) != len(owners) or len(schemes) != 1:
            raise _impossible(found[0], entry, f"it is one tensor for {', '.join(owners)}, which get different schemes")
        planned.append(_quantized(entry, quantized, sinks, found[0], export))
    return planned


def _quantized(
    entry: TensorEntry, spans: Sequence[Span], sinks: Mapping[str, Sink], assignment: Assignment, export: ExportFormat
) -> QuantizedTensor:
    scheme = assignment.scheme
    assert scheme is not None
    weight = exported_weight(scheme, export)
    if len(entry.shape) != 2 or not entry.name.endswith(_SUFFIX):
        raise _impossible(assignment, entry, f"{export.name} knows one matrix for each linear and each expert")
    rows, columns = entry.shape
    layout = WeightLayout(scheme.kernels.format, None, (("", rows),), columns)
    if any(span.column_stride != 1 or span.row_stride % columns or span.offset % columns for span in spans):
        raise _impossible(assignment, entry, f"it is stored transposed or in parts, {export.name} knows whole rows")
    if columns % weight.column_multiple:
        raise _impossible(
            assignment, entry, f"it has {columns} columns, {export.name} needs a multiple of {weight.column_multiple}"
        )
    if not all(sinks[span.parameter].whole(span.region) and layout.whole(_rows_of(span, columns)) for span in spans):
        raise _impossible(assignment, entry, f"{scheme.name} scales it together with other tensors, or parts of it")
    return QuantizedTensor(entry, entry.name.removesuffix(_SUFFIX), assignment, scheme, layout, weight)


def _rows_of(span: Span, columns: int) -> Region:
    """The rows of the checkpoint tensor a span takes, from the first to the last."""
    first = span.offset // columns
    count = (span.region.rows[1] - span.region.rows[0] - 1) * span.row_stride // columns + 1
    return Region(None, (first, first + count), (0, columns))


def _refuse_whole(target: str, sinks: Mapping[str, Sink]) -> None:
    sink = sinks.get(target)
    if sink is not None and not sink.direct:
        raise PolicyError(
            f"{target} is made from its checkpoint tensors by an operation that cannot be undone in a quantized "
            f"checkpoint; keep it with an ignore pattern: {target.rpartition('.')[0]}"
        )


def _impossible(assignment: Assignment, entry: TensorEntry, why: str) -> PolicyError:
    return PolicyError(
        f"{assignment.name} cannot be converted: checkpoint tensor {entry.name} {list(entry.shape)}: {why}; "
        f"keep it with an ignore pattern, {assignment.name}"
    )


def kept_modules(model: nn.Module, planned: Sequence[QuantizedTensor | KeptTensor], routes: Routes) -> list[str]:
    """The modules a tool must not take for quantized, by their names in the checkpoint, in the order of the model.

    Linear layers that are kept, and whatever else has a matrix called `weight` without being an embedding: routers are
    linear layers to some tools. The experts of one module are one name with a `*`.
    """
    of_parameter: dict[str, list[str]] = {}
    unrouted: list[str] = []
    for tensor in planned:
        if isinstance(tensor, KeptTensor) and len(tensor.entry.shape) == 2 and tensor.entry.name.endswith(_SUFFIX):
            name = tensor.entry.name.removesuffix(_SUFFIX)
            spans = routes.spans.get(tensor.entry.name, [])
            unrouted += [name] if not spans and name_reason(name) != "embedding" else []
            for parameter in {span.parameter: None for span in spans}:
                of_parameter.setdefault(parameter, []).append(name)
    quantized = {f"{each.assignment.name}" for each in planned if isinstance(each, QuantizedTensor)}
    names: dict[str, None] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or path in quantized:
            continue
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        stored = [name for parameter in own for name in of_parameter.get(parameter, ())]
        names.update(dict.fromkeys(map(_without_number, stored)))
        if isinstance(module, nn.Linear) and not stored:
            names[path] = None
    names.update(dict.fromkeys(map(_without_number, unrouted)))
    return list(names)


def quantized_modules(planned: Iterable[QuantizedTensor | KeptTensor]) -> Iterator[tuple[str, QuantizedTensor]]:
    """The modules that are quantized, by their names in the checkpoint; the experts of one module once, with a `*`."""
    seen: set[str] = set()
    for tensor in planned:
        if isinstance(tensor, QuantizedTensor):
            name = _without_number(tensor.module)
            if name not in seen:
                seen.add(name)
                yield name, tensor


def _without_number(name: str) -> str:
    return _EXPERT_NUMBER.sub("*", name)
