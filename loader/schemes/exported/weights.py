"""A quantized weight as a checkpoint format stores it: which tensors, and how they are made of codes and scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...checkpoint.writer import TensorSpec
from ...geometry.layout import WeightLayout
from ...kernels.formats import WeightFormat

Shape = tuple[int, ...]
Source = Literal["codes", "scales", "scales_2"]
SOURCES: tuple[Source, ...] = get_args(Source)


def as_it_is(shape: Shape) -> Shape:
    """The declared shape of a tensor that is declared as the matrix it is."""
    return shape


def as_vector(shape: Shape) -> Shape:
    """The declared shape of a matrix with one column that is stored as a vector."""
    return shape[:-1]


def as_scalar(shape: Shape) -> Shape:
    """The declared shape of a matrix with one element that is stored as a number."""
    return shape[:-2]


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor made of the codes or the scales of a weight, and how it is made of them.

    `source` is the tensor of the format that it is made of: the codes, the scales, or the scales of the second level.

    `name` follows on the stem that all tensors of a weight share. A row of it is made of `block` rows of the source,
    and is `width` times as long, in bytes. `convert` makes rows of it from rows of the source; `None`: the bytes are
    the same. `dtype` is what it is declared as (`None`: the source's), and `declared` turns the shape of the matrix
    into the one in the header. `filled` says whether the zeros that fill up an incomplete last block of codes are
    stored too.
    """

    name: str
    source: Source
    dtype: torch.dtype | None = None
    block: int = 1
    width: Fraction = Fraction(1)
    convert: Callable[[Tensor], Tensor] | None = None
    declared: Callable[[Shape], Shape] = as_it_is
    filled: bool = True

    @property
    def number(self) -> int:
        """The place of the source among the tensors of the format."""
        return SOURCES.index(self.source)

    def spec(self, stem: str, layout: WeightLayout) -> TensorSpec:
        """Name, dtype and shape for a weight of this layout."""
        shape, dtype = self._source(layout)
        stored = self.dtype or dtype
        matrix = (*shape[:-2], self.rows(layout), self.pitch(layout) // stored.itemsize)
        return TensorSpec(stem + self.name, stored, self.declared(matrix))

    def rows(self, layout: WeightLayout) -> int:
        """Rows of one matrix."""
        return math.ceil(self._source(layout)[0][-2] / self.block)

    def pitch(self, layout: WeightLayout) -> int:
        """Bytes of one row."""
        shape, dtype = self._source(layout)
        return int(shape[-1] * dtype.itemsize * self.width)

    def _source(self, layout: WeightLayout) -> tuple[Shape, torch.dtype]:
        shape, tensor = layout.shapes[self.number], layout.format.tensors[self.number]
        if not self.filled:
            shape = (*shape[:-1], replace(tensor, padded=1).shape(1, layout.columns)[1])
        return shape, tensor.dtype


@dataclass(frozen=True)
class ExportedConstant:
    """A tensor that follows from the size of the weight alone: `make(rows, columns)`."""

    name: str
    make: Callable[[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class ExportedWeight:
    """How weights of one format are stored, and what the config says about them.

    `config` is the tool's description of weights and activations, as it stands in `quantization_config`.
    `column_multiple`: the tool reads only weights whose columns are a multiple of it. `fused` weights are those of all
    experts of a layer in one tensor, transposed, gate and up interleaved; others are one matrix called `weight`.
    """

    parts: tuple[ExportedTensor, ...]
    config: Mapping[str, Any]
    constants: tuple[ExportedConstant, ...] = field(default=())
    column_multiple: int = 1
    fused: bool = False

    @property
    def row_align(self) -> int:
        """Rows a piece must come in multiples of, for every part to have whole rows."""
        return math.lcm(*(part.block for part in self.parts))

    def divides(self, columns: int) -> bool:
        """Whether weights of so many columns can be stored."""
        return columns % self.column_multiple == 0

    def specs(self, stem: str, layout: WeightLayout) -> Iterator[TensorSpec]:
        """All tensors of one weight."""
        for name, dtype, shape in _specs(self, layout):
            yield TensorSpec(stem + name, dtype, shape)


@lru_cache(maxsize=256)
def _specs(weight: ExportedWeight, layout: WeightLayout) -> list[TensorSpec]:
    """The tensors of a weight by what follows on their stem: the same for thousands of experts."""
    specs = [part.spec("", layout) for part in weight.parts]
    for constant in weight.constants:
        value = constant.make(layout.rows, layout.columns)
        specs.append(TensorSpec(constant.name, value.dtype, tuple(value.shape)))
    return specs


@dataclass
class NamedModules:
    """The modules of a checkpoint by all names they have, in the order of the files and of the model.

    `formats` are those of the quantized ones, `kept` are the others. Experts that are alike are one name with a `*` for
    their number; those that the files have in one tensor are that of their module, and the same with `.*`. `heads` are
    those of `formats` that turn hidden states into logits, and embeddings. `weights` are the quantized tensors by their
    names in the files.
    """

    formats: dict[str, WeightFormat] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    weights: dict[str, WeightLayout] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportFormat:
    """A checkpoint format that quantized weights can be written in.

    `weights` says how, by the name of the weight format. `quantization_config` makes the entry of config.json.
    `experts_in_transformers` are formats of experts that transformers
    was seen to read; of some others it takes the codes for numbers without a word. `readers` are the tools that were
    seen to read it, with the formats of weights; of experts transformers reads no others than those.
    """

    name: str
    weights: Mapping[str, ExportedWeight]
    quantization_config: Callable[[NamedModules], dict[str, Any]]
    experts_in_transformers: frozenset[str] = frozenset()
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def read_by(self, linear: Iterable[str], experts: Iterable[str]) -> list[str]:
        """The tools that read a checkpoint with weights in these formats."""
        found = []
        for tool, known in self.readers.items():
            of_experts = self.experts_in_transformers if tool.startswith("transformers") else known
            if known.issuperset(linear) and of_experts.issuperset(experts):
                found.append(tool)
        return [*found, "quantload"]

    def holds(self, weight_format: WeightFormat, *, experts: bool) -> bool:
        """Whether weights of a format can be written: those of experts, or those of linear layers."""
        weight = self.weights.get(weight_format.name)
        return weight is not None and (experts or not weight.fused)
