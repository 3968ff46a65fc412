"""The error of weights in each scheme, from a few rows of a few tensors of every kind and depth."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.folder import Checkpoint
from ..checkpoint.source import Source, read_bytes
from ..draft import Draft
from ..geometry.layout import WeightLayout
from ..geometry.spans import Span
from ..kernels.statistics import NOISE, SIGNAL
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.base import LinearScheme, MoEScheme, NonFiniteError
from ..schemes.registry import SchemeFactory
from .expected_loss import Item

ROWS = 128
"""Rows of a sample: those of one block of `fp8_per_block`, the tallest there is."""
TENSORS = 4
"""Checkpoint tensors that are looked at of each kind in each third of the layers."""
MOST_BYTES = 64 << 20
"""Largest part of a file that is read for a sample; transposed weights take more than their rows."""
VALUES = (torch.bfloat16, torch.float16, torch.float32)

Group = tuple[str, str]
"""A kind of module, and a third of the layers."""


@dataclass(frozen=True)
class Sample:
    """Rows of a weight of a kind of module in a third of the layers."""

    group: Group
    is_experts: bool
    values: Tensor


def sampled_errors(
    draft: Draft, checkpoint: Checkpoint, items: Sequence[Item], schemes: Collection[str], policy: QuantizationPolicy
) -> dict[str, dict[Group, float]]:
    """The relative squared error of weights by scheme, kind and third, as far as there are samples of it.

    Kernels are those of this processor, wherever the model goes: codes and scales are the same.
    """
    made = {scheme: SchemeFactory(torch.device("cpu"), LoadOptions(), policy.scale_mode) for scheme in schemes}
    sums: dict[str, dict[Group, list[float]]] = {scheme: {} for scheme in schemes}
    with closing(checkpoint.files.source(LoadOptions(page_cache="keep"))) as source:
        for sample in _samples(draft, source, items):
            for scheme, factory in made.items():
                chosen = factory.experts(scheme) if sample.is_experts else factory.linear(scheme)
                error = 0.0 if chosen is None else _error(chosen, sample.values)
                if error is not None:
                    sums[scheme].setdefault(sample.group, []).append(error)
    return {
        scheme: {group: sum(errors) / len(errors) for group, errors in found.items()} for scheme, found in sums.items()
    }


def _error(scheme: LinearScheme | MoEScheme, values: Tensor) -> float | None:
    """The relative squared error of a matrix; None for one of zeros, or with values that are not finite."""
    rows, columns = values.shape
    layout = WeightLayout(scheme.kernels.format, None, (("", rows),), columns)
    tensors = tuple(torch.zeros(shape, dtype=dtype) for dtype, shape in layout.tensors)
    try:
        found = scheme.quantizer.quantize(values, tensors)
    except NonFiniteError:
        return None
    assert found.values is not None
    signal, noise = float(found.values[SIGNAL]), float(found.values[NOISE])
    return noise / signal if signal else None


def _samples(draft: Draft, source: Source, items: Sequence[Item]) -> Iterator[Sample]:
    for (group, is_experts), spans in _candidates(draft, items).items():
        for name, span in _spread(spans):
            entry = draft.index.tensors[name]
            values = _rows(source, draft.index.shards[entry.shard].path, entry.offset, entry.dtype, span)
            if values is not None:
                yield Sample(group, is_experts, values)


def _candidates(draft: Draft, items: Sequence[Item]) -> Mapping[tuple[Group, bool], list[tuple[str, Span]]]:
    """Tensors of values, each with a span of it, by what they are and where."""
    groups = {name: ((item.kind, item.third), item.kind == "experts") for item in items for name in item.names}
    found: dict[tuple[Group, bool], list[tuple[str, Span]]] = {}
    for name, spans in draft.routes.spans.items():
        group = groups.get(spans[0].parameter.rpartition(".")[0]) if spans else None
        entry = draft.index.tensors.get(name)
        if group is not None and entry is not None and entry.dtype in VALUES and _is_quantized(draft, spans[0]):
            found.setdefault(group, []).append((name, spans[0]))
    return found


def _is_quantized(draft: Draft, span: Span) -> bool:
    """Whether a span is of a weight, and not of a bias beside it."""
    return draft.loaders.sinks[span.parameter].values_dtype is None


def _spread(spans: Sequence[tuple[str, Span]]) -> Iterator[tuple[str, Span]]:
    """Some of them, from all over."""
    count = min(TENSORS, len(spans))
    for number in range(count):
        yield spans[(2 * number + 1) * len(spans) // (2 * count)]


def _rows(source: Source, path: str, offset: int, dtype: torch.dtype, span: Span) -> Tensor | None:
    """Rows from the middle of a span; None where a file would have to be read for a sample."""
    all_rows, columns = (end - begin for begin, end in (span.region.rows, span.region.columns))
    rows = min(ROWS, all_rows)
    first = span.offset + (all_rows - rows) // 2 * span.row_stride
    elements = (rows - 1) * span.row_stride + (columns - 1) * span.column_stride + 1
    if elements * dtype.itemsize > MOST_BYTES:
        return None
    data = read_bytes(source, path, offset + first * dtype.itemsize, elements * dtype.itemsize)
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
    return flat.as_strided((rows, columns), (span.row_stride, span.column_stride)).contiguous()
