"""Where every element of the checkpoint goes: checkpoint name -> regions of parameters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.headers import TensorEntry
from ..errors import MissingWeightsError, ShapeMismatchError, UnexpectedWeightsError
from ..geometry.layout import WeightLayout
from ..geometry.regions import Region
from ..geometry.spans import Landing, Span
from ..schemes.stored.weights import StoredWeight
from . import transformers_api
from .boxes import Box, as_matrix
from .coordinates import Coordinates, NotExpressible
from .leftovers import NAMES_SHOWN, Leftovers, some
from .transformers_api import Conversion
from .unexplained_codes import check_scales

CheckpointTensor = TensorEntry | StoredWeight
"""What a parameter is made of: a checkpoint tensor, or several that stand for a quantized one."""


class ModelShapes:
    """What transformers' operations ask of a model: its config and the shapes of its parameters before quantization."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.tensors: dict[str, Tensor] = model.state_dict()

    def get_parameter(self, name: str) -> Tensor:
        """The meta tensor of a parameter."""
        return self.tensors[name]

    get_parameter_or_buffer = get_buffer = get_parameter


@dataclass
class CheckpointMap:
    """The checkpoint's tensors on the coordinates of the unquantized model.

    A parameter's coordinates name its sources by their place in the conversion. `templates` are the results that
    conversions of the same shapes share, one layer's with the next one's.
    """

    shapes: ModelShapes
    conversions: list[Conversion]
    coordinates: dict[str, tuple[Coordinates, Conversion]]
    not_expressible: list[Conversion]
    ignored: list[str]
    missing: set[str]
    weight_conversions: list[Any]
    templates: dict[Any, dict[str, Any]] = field(default_factory=dict)
    leftovers: Leftovers = field(default_factory=Leftovers)


@dataclass
class Routes:
    """The spans of every checkpoint tensor, and the conversions that need their tensors whole."""

    spans: dict[str, list[Span]] = field(default_factory=dict)
    whole: list[Conversion] = field(default_factory=list)


class LandingOf(Protocol):
    """Tells where a parameter is written."""

    def __call__(self, parameter: str) -> Landing:
        """The landing of a parameter by its full name."""


def map_checkpoint(model: PreTrainedModel, tensors: Mapping[str, CheckpointTensor]) -> CheckpointMap:
    """Rename, group and convert every checkpoint name, without a byte of data.

    Tied parameters of `model` get their values from those of their group that the checkpoint has. Raises
    `MissingWeightsError` and `ShapeMismatchError`, after the exceptions the model class declares,
    `UnexpectedWeightsError` for more tensors than a parameter is made of, and `CheckpointError` for codes with scales
    that no config explains.
    """
    names = transformers_api.plan_names(model, tensors)
    mapped = CheckpointMap(ModelShapes(model), names.conversions, {}, [], [], set(), names.weight_conversions)
    loaded: set[str] = set()
    for conversion in names.conversions:
        for name, coordinates in _convert(mapped, conversion, tensors).items():
            loaded.add(name)
            if coordinates is not None:
                mapped.coordinates[name] = (coordinates, conversion)
    transformers_api.tie_to(model, loaded)
    unexpected = [*names.unexpected, *(name for name in loaded if name not in mapped.shapes.tensors)]
    mapped.missing = set(mapped.shapes.tensors) - loaded
    mapped.ignored = sorted(set(unexpected))
    wanted, surplus = transformers_api.complaints(model, mapped.missing, unexpected)
    if surplus:
        check_scales(surplus, names.conversions, tensors)
    cls = type(model).__name__
    if wanted:
        unknown = f"; {len(surplus)} checkpoint tensors are unknown to it: {some(surplus)}" if surplus else ""
        raise MissingWeightsError(
            f"{len(wanted)} parameters of {cls} have no tensor in the checkpoint: {some(wanted)}{unknown}; "
            f"the checkpoint is incomplete, or config.json describes another model"
        )
    initialized = mapped.missing - transformers_api.tied_names(model)
    mapped.leftovers = Leftovers.of(cls, surplus, mapped.ignored, initialized, tensors)
    return mapped


def _convert(
    mapped: CheckpointMap, conversion: Conversion, tensors: Mapping[str, CheckpointTensor]
) -> dict[str, Coordinates | None]:
    names = conversion.names()
    if conversion.converter is None and len(names) > 1:
        raise UnexpectedWeightsError(f"checkpoint tensors {some(names)} all go to {conversion.target}; keep one")
    try:
        converted = transformers_api.full_names(conversion, _operate(mapped, conversion, tensors))
    except NotExpressible:
        mapped.not_expressible.append(conversion)
        return dict.fromkeys(targets(mapped, conversion))
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        _explain(mapped, conversion)
        shapes = {name: tensors[name].shape for name in names[:NAMES_SHOWN]}
        raise ShapeMismatchError(f"{conversion.target} cannot be made from {shapes}: {error}") from error
    for name, coordinates in converted.items():
        expected = mapped.shapes.tensors.get(name)
        if expected is not None and coordinates.shape != expected.shape:
            _explain(mapped, conversion)
            raise ShapeMismatchError(
                f"{name}: the checkpoint gives shape {tuple(coordinates.shape)} (from {some(names)}), the model has "
                f"{tuple(expected.shape)}; is config.json the one of this checkpoint?"
            )
    return dict(converted)


def _operate(mapped: CheckpointMap, conversion: Conversion, tensors: Mapping[str, CheckpointTensor]) -> dict[str, Any]:
    """The results of a conversion on coordinates, or those of an earlier one that differs in its names only."""
    if not transformers_api.asks_for_shapes_only(conversion):
        return transformers_api.operate(mapped.shapes, conversion, _identities(conversion, tensors))
    counts = tuple([(pattern, len(names)) for pattern, names in conversion.sources.items()])
    key = (
        None if conversion.converter is None else (id(conversion.converter), counts),
        tuple([mapped.shapes.tensors[name].shape for name in targets(mapped, conversion)]),
        tuple([_kind(tensors[name]) for name in conversion.names()]),
    )
    if key not in mapped.templates:
        sources = _identities(conversion, tensors)
        mapped.templates[key] = transformers_api.operate(mapped.shapes, conversion, sources)
    return mapped.templates[key]


def _identities(conversion: Conversion, tensors: Mapping[str, CheckpointTensor]) -> dict[str, torch.Tensor]:
    """The sources of a conversion as coordinates, numbered in order."""
    entries = [tensors[name] for name in conversion.names()]
    return {entry.name: Coordinates.of(i, *_kind(entry)) for i, entry in enumerate(entries)}


def _kind(entry: CheckpointTensor) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...] | None]:
    """Shape, dtype, and strides where the elements do not lie row by row."""
    return entry.shape, entry.dtype, entry.strides if isinstance(entry, StoredWeight) else None


def targets(mapped: CheckpointMap, conversion: Conversion) -> Iterator[str]:
    """Parameters a conversion fills, from its target patterns."""
    patterns = conversion.converter.target_patterns if conversion.converter is not None else []
    for pattern in patterns:
        name = conversion.target.replace(patterns[0], pattern)
        if name in mapped.shapes.tensors:
            yield name
    if not patterns:
        yield conversion.target


def _explain(mapped: CheckpointMap, conversion: Conversion) -> None:
    """Raise the right error if what is wrong with a conversion is that tensors are absent, or too many."""
    expected = mapped.shapes.tensors.get(conversion.target)
    if conversion.converter is None or expected is None:
        return
    absent = [p for p in conversion.converter.source_patterns if p not in conversion.sources]
    surplus: list[str] = []
    everyone = range(expected.shape[0]) if any("*" in p for p in conversion.converter.source_patterns) else range(0)
    for names in map(_numbered, conversion.sources.values()):
        absent += [_renumber(*next(iter(names.items())), i) for i in everyone if names and i not in names]
        surplus += [name for i, name in names.items() if everyone and i not in everyone]
    if surplus:
        raise UnexpectedWeightsError(
            f"{conversion.target} has {len(everyone)} experts, the checkpoint has more: {some(surplus)}; "
            f"is config.json the one of this checkpoint?"
        )
    if absent:
        raise MissingWeightsError(
            f"{conversion.target} needs {len(absent)} more checkpoint tensors: {some(absent)}; "
            f"the checkpoint is incomplete, or config.json describes another model"
        )


def _numbered(names: list[str]) -> dict[int, str]:
    """Names by the last number in which they differ from each other (their expert id)."""
    digits = [[int(part) for part in re.findall(r"(?<=\.)\d+(?=\.)", name)] for name in names]
    for position in reversed(range(min(map(len, digits), default=0))):
        if len({numbers[position] for numbers in digits}) == len(names) > 1:
            return {numbers[position]: name for numbers, name in zip(digits, names, strict=True)}
    return {}


def _renumber(number: int, template: str, wanted: int) -> str:
    head, _, tail = template.rpartition(f".{number}.")
    return f"{head}.{wanted}.{tail}"


def build_routes(mapped: CheckpointMap, landing_of: LandingOf) -> Routes:
    """Turn coordinates into spans of the parameters as they will be written.

    A conversion one of whose spans cuts through a byte of codes is carried out whole instead.
    """
    routes = Routes(whole=list(mapped.not_expressible))
    whole = {id(conversion) for conversion in routes.whole}
    # Layers share their coordinates, and so their patterns.
    patterns: dict[tuple[int, Landing], _Pattern] = {}
    for name, (coordinates, conversion) in mapped.coordinates.items():
        landing = landing_of(name)
        key = (id(coordinates), landing)
        if key not in patterns:
            patterns[key] = _Pattern(list(_spans(coordinates, landing)), landing)
        if patterns[key].cuts_codes and id(conversion) not in whole:
            whole.add(id(conversion))
            routes.whole.append(conversion)
    for name, (coordinates, conversion) in mapped.coordinates.items():
        if id(conversion) in whole:
            continue
        names = conversion.names()
        for span in patterns[id(coordinates), landing_of(name)].spans:
            routes.spans.setdefault(names[span[0]], []).append(Span(name, *span[1:]))
    return routes


class _Pattern:
    """Spans without the names of their parameter and sources."""

    def __init__(self, spans: list[_NamelessSpan], landing: Landing) -> None:
        self.spans = spans
        regions = (region for _, region, *_ in spans)
        self.cuts_codes = landing.layout is not None and not all(map(landing.layout.code_aligned, regions))


_NamelessSpan = tuple[int, Region, int, int, int]


def _spans(coordinates: Coordinates, landing: Landing) -> Iterator[_NamelessSpan]:
    """Number of the source, region, offset and strides of every span."""
    with torch._C.DisableTorchFunctionSubclass():
        shape = tuple(coordinates.shape)
    for box in coordinates.boxes:
        for expert, matrix in _matrices(box, shape, landing):
            row_stride, column_stride = matrix.strides
            rows = (matrix.start[0], matrix.start[0] + matrix.shape[0])
            columns = (matrix.start[1], matrix.start[1] + matrix.shape[1])
            for low, high in _at_shard_borders(rows, landing.layout):
                offset = matrix.offset + (low - rows[0]) * row_stride
                yield matrix.source, Region(expert, (low, high), columns), offset, row_stride, column_stride


def _matrices(box: Box, shape: tuple[int, ...], landing: Landing) -> Iterator[tuple[int | None, Box]]:
    """The two-dimensional parts of a box, in the orientation they are written in."""
    if landing.layout is None:
        for flat in as_matrix(box, shape):
            yield None, flat
    elif landing.experts is None:
        yield None, _turned(box, landing.transposed)
    else:
        for i in range(box.shape[0]):
            part = Box(box.source, box.start[1:], box.shape[1:], box.offset + i * box.strides[0], box.strides[1:])
            yield box.start[0] + i, _turned(part, landing.transposed)


def _turned(box: Box, transposed: bool) -> Box:
    if not transposed:
        return box
    return Box(box.source, box.start[::-1], box.shape[::-1], box.offset, box.strides[::-1])


def _at_shard_borders(rows: tuple[int, int], layout: WeightLayout | None) -> Iterator[tuple[int, int]]:
    borders = [] if layout is None else layout.shard_borders()
    edges = [rows[0], *(border for border in borders if rows[0] < border < rows[1]), rows[1]]
    yield from itertools.pairwise(edges)
