"""A quantized weight as a checkpoint stores it: several tensors that stand for one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ...checkpoint.headers import TensorEntry
from ...kernels.formats import FormatTensor, WeightFormat

Role = Literal["codes", "scale", "zero_point", "scale_2", "must_be_zero", "order", "shape", "input_scale"]


def scale_roles(fmt: WeightFormat) -> dict[Role, tuple[int, int]]:
    """The roles of what a format holds beside the codes: which scale tensor of it, and which word of a block there.

    The second word of the first tensor is a zero point; of each further tensor there is one.
    """
    found: dict[Role, tuple[int, int]] = {scale_role(scale): (number, 0) for number, scale in enumerate(fmt.scales)}
    return found | ({"zero_point": (0, 1)} if fmt.scale_words == 2 else {})


def scale_role(scale: FormatTensor) -> Role:
    """The role of a scale tensor: its suffix."""
    return cast("Role", scale.suffix.removeprefix("_"))


class StoredTensor(NamedTuple):
    """One tensor of a stored weight, and how it becomes canonical.

    The tensor is seen as a matrix: its leading dimensions are flattened, a scalar or vector has one column. One row of
    it stands for `block` rows of the weight (columns, where the weight is cut along columns); 0: it has one row, for
    everything. `convert` takes some of its rows, [n, ...] in the stored dtype, and returns what they are in the
    canonical layout: codes [rows, code columns], or the values of one scale word, [scale rows, scale blocks], in the
    dtype of the format's scales. `None`: the bytes are canonical as they are. Where several weights share one, it is
    called once for the rows of all of them, one weight's below the other's. `must_be_zero`, `order`, the group that
    each column is in, and `shape`, the rows and columns of the weight, are only checked; `input_scale` is the role of
    the scale of a weight's activations.
    """

    role: Role
    entry: TensorEntry
    block: int = 1
    convert: Callable[[Tensor], Tensor] | None = None

    @property
    def only_checked(self) -> bool:
        """Whether nothing is made of it."""
        return self.role in ("must_be_zero", "order", "shape")


@dataclass(frozen=True)
class StoredActivations:
    """What a config says about the input of a layer.

    `format`: mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8, fp8 or int8. `granularity`: tensor, token or group (1 x `group`
    elements). A static scale is `scale`, one number a tensor, in the checkpoint, `None` where that has none; a dynamic
    one is found in the forward.
    """

    format: str
    dynamic: bool
    granularity: Literal["tensor", "token", "group"]
    group: int = 0
    scale: TensorEntry | None = None

    @property
    def lacks_scale(self) -> bool:
        """Whether they are static and the checkpoint does not say with which scale."""
        return not self.dynamic and self.scale is None

    @property
    def kind(self) -> tuple[str, bool, str, int]:
        """All of it that two layers can have in common."""
        return self.format, self.dynamic, self.granularity, self.group


class StoredWeight(NamedTuple):
    """Tensors that stand for the weight `name`, as one tensor that is not quantized.

    `rows` and `columns` are those of the matrix [N, K] as its codes lie, `experts` how many of them there are (None:
    one, without a dimension for it). `transposed` says that the model keeps it as [K, N]. `dtype` is that of the weight
    it stands for. The codes are the first of `parts`. `along` is the dimension pieces are cut along, where `parts` lie
    contiguously (columns: of one matrix only), and `step` the rows or columns a piece must come in multiples of.
    Without a `zero_point` part, all zero points are `zero_point`. `values` are small tensors that were read with the
    config, such as a second scale: what they say is in the parts.
    """

    name: str
    format: WeightFormat
    experts: int | None
    rows: int
    columns: int
    dtype: torch.dtype
    parts: tuple[StoredTensor, ...]
    transposed: bool = False
    along: Literal["rows", "columns"] = "rows"
    step: int = 1
    zero_point: float = 0.0
    activations: StoredActivations | None = None
    values: tuple[TensorEntry, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for, experts first."""
        matrix = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def strides(self) -> tuple[int, ...]:
        """Where the elements of `shape` stand in the matrices as they are stored, in elements."""
        matrix = (1, self.columns) if self.transposed else (self.columns, 1)
        return matrix if self.experts is None else (self.rows * self.columns, *matrix)

    @property
    def largest_scale(self) -> float:
        """The largest float scale with which every code stands for a finite number of `dtype`."""
        return torch.finfo(self.dtype).max / self.format.largest

    @property
    def codes(self) -> StoredTensor:
        """The part with the codes."""
        return self.parts[0]

    @property
    def input_scale(self) -> TensorEntry | None:
        """The static scale of the activations."""
        return None if self.activations is None else self.activations.scale

    @property
    def shard(self) -> int:
        """The shard with the codes."""
        return self.codes.entry.shard

    @property
    def offset(self) -> int:
        """Where the codes begin in their shard, in bytes."""
        return self.codes.entry.offset

    @property
    def all_rows(self) -> int:
        """Rows of all matrices, one below the other."""
        return (self.experts or 1) * self.rows

    @property
    def lines(self) -> int:
        """How far the dimension goes that pieces are cut along: all rows, or the columns."""
        return self.all_rows if self.along == "rows" else self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the checkpoint."""
        return sum(part.entry.nbytes for part in self.parts)

    def entries(self) -> Iterator[TensorEntry]:
        """The checkpoint tensors it is made of."""
        yield from (part.entry for part in self.parts)
        yield from self.values
        if self.input_scale is not None:
            yield self.input_scale


@dataclass(frozen=True)
class StoredCheckpoint:
    """The quantized weights of a checkpoint, and everything else in it.

    `method` names the tool (quark, compressed-tensors, awq, mxfp4, fp8, modelopt). `weights` are by the name of the
    weight they stand for, such as `model.layers.0.mlp.down_proj.weight`; `plain` are the tensors that are no part of
    one. `unused` are tensors that nothing here reads, with the reason.
    """

    method: str
    weights: Mapping[str, StoredWeight]
    plain: Mapping[str, TensorEntry]
    unused: Mapping[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, TensorEntry | StoredWeight]:
        """All that goes to parameters: weights under the names of what they stand for, and plain tensors."""
        return {**self.plain, **self.weights}
