"""Weight formats as data: what the codes and scales of a 2-D weight look like, before any kernel is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType

import torch

from . import nl4_levels
from .mx_elements import E2M1, E2M3, E3M2, E4M3, ELEMENTS, MxElement
from .scale_rules import LARGEST_BF16, largest_extreme

Tensors = tuple[torch.Tensor, ...]
"""The tensors of a weight, in the order of its format: codes, then scales."""


@dataclass(frozen=True, eq=False)
class FormatTensor:
    """One tensor of a weight, and which of its elements belong to which rows and columns of a matrix [rows, cols].

    Its name is that of the weight and then `suffix`. A row of it belongs to `block_rows` rows of the matrix, and
    `width` elements of that row to `block_cols` columns; 0 means the whole extent of that dimension. `beside` more
    elements stand at the end of each row, for all of its columns. Columns are filled up to a multiple of `padded`.
    """

    suffix: str
    dtype: torch.dtype
    block_rows: int
    block_cols: int
    width: int = 1
    beside: int = 0
    padded: int = 1

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Its shape for a matrix whose true size is [rows, cols]."""
        filled = _ceil_div(cols, self.padded) * self.padded
        return (
            _ceil_div(rows, self.block_rows) if self.block_rows else 1,
            self.width * (_ceil_div(filled, self.block_cols) if self.block_cols else 1) + self.beside,
        )

    def rows(self, first: int, last: int) -> tuple[int, int]:
        """The rows of it, first and behind the last, that rows [first, last) need; `first` begins a block."""
        size = self.block_rows
        return (first // size, _ceil_div(last, size)) if size else (0, 1)

    def columns(self, first: int, last: int, cols: int) -> slice:
        """The columns of it that columns [first, last) of `cols` need; `first` begins a block."""
        end = self.shape(1, cols)[1]
        if self.beside or not self.block_cols:
            return slice(0, end)
        stop = end if last == cols else _ceil_div(last, self.block_cols) * self.width
        return slice(first // self.block_cols * self.width, stop)

    def bytes(self, rows: int, cols: int) -> int:
        """Its size."""
        height, width = self.shape(rows, cols)
        return height * width * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Family:
    """Formats that the same modules serve.

    Each of `reference`, `cpu` and `gpu` is "module:attribute" in the folder of that name, or None where there is none:
    `reference(format, scale mode)` makes the plain torch operations, `cpu(format, reference, scale mode)` those of
    numba, `gpu(format, scale mode)` the launches of a `TritonQuantize`. Matmuls on GPUs are rows of `gpu/matmuls.py`.
    `scale_modes` are the ways in which scales can be chosen, `gpu_modes` those that the launches have.
    """

    name: str
    reference: str
    cpu: str | None = None
    gpu: str | None = None
    scale_modes: tuple[str, ...] = ("default",)
    gpu_modes: tuple[str, ...] = ("default",)


@dataclass(frozen=True, eq=False)
class WeightFormat:
    """How a matrix [rows, cols] of weights is stored as codes and scales.

    `block_rows` x `block_cols` elements share one scale; 0 means the whole extent of that dimension.
    A code takes `code_bits` bits; codes of fewer than eight are packed into bytes, the first in the lowest bits.
    `pads_cols` says that the codes of an incomplete last block are stored too (as zeros). `scale_words` is how many
    numbers stand side by side in the scale tensor for each block: 1, a scale; 2, a scale and a zero point, and a weight
    is (code - zero point) * scale. `one_maximum` says that matrices that engines multiply at once are scaled by the
    largest of their maxima. There is one of each name: a copy, or one that was pickled, is the same object.

    `family` says which modules serve it. `element` is the type of a code, `label` what people call it, and `largest`
    the largest magnitude that a code stands for without its scale. `rule` is how scales follow from maxima, `decoder`
    how the kernels for CPUs read codes. `activations` are those that go with such weights beside high precision, its
    own first, as `schemes.activations` spells them. `ocp` is the format with the same bits in the E4M3 of OCP, where
    this one is what hardware with E4M3 FNUZ stores for it.
    """

    name: str
    code_dtype: torch.dtype
    scale_dtype: torch.dtype
    block_rows: int
    block_cols: int
    code_bits: int
    pads_cols: bool = False
    scale_words: int = 1
    one_maximum: bool = False
    _: KW_ONLY
    family: Family | None = None
    element: str = ""
    label: str = ""
    largest: float = 0.0
    rule: str = ""
    decoder: str = ""
    activations: tuple[str, ...] = ()
    ocp: WeightFormat | None = None

    @cached_property
    def tensors(self) -> tuple[FormatTensor, ...]:
        """All tensors of a weight, in the order in which kernels take them: the codes, then the scales."""
        filled = self.block_cols if self.pads_cols else 1
        width = self.packed * self.code_bits // 8
        return FormatTensor("", self.code_dtype, 1, self.packed, width, padded=filled), *self.scales

    @cached_property
    def scales(self) -> tuple[FormatTensor, ...]:
        """The tensors beside the codes."""
        return (FormatTensor("_scale", self.scale_dtype, self.block_rows, self.block_cols, self.scale_words),)

    def __reduce__(self) -> tuple[Callable[[str], WeightFormat], tuple[str]]:
        return _named, (self.name,)

    @cached_property
    def rows_in_common(self) -> int:
        """Rows that share a scale at most: a matrix of a multiple of them needs none of another; 0: all of them."""
        heights = [scale.block_rows for scale in self.scales]
        return math.lcm(*heights) if all(heights) else 0

    def joins_rows(self, cols: int) -> bool:
        """Whether rows of so many columns have the same codes and scales laid end to end and one below the other."""
        within = self.block_cols > 0 and all(scale.block_cols for scale in self.scales)
        return within and self.rows_in_common == 1 and cols % self.block_cols == 0

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """What follows on the name of a weight in those of its tensors."""
        return tuple(tensor.suffix for tensor in self.tensors)

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """The dtype of each of them."""
        return [tensor.dtype for tensor in self.tensors]

    def shapes(self, rows: int, cols: int) -> tuple[tuple[int, int], ...]:
        """Shape of each tensor of a matrix whose true size is [rows, cols]."""
        return _shapes(self, rows, cols)

    @cached_property
    def maxima(self) -> FormatTensor:
        """The float32 maxima that `observe` raises, from which `finish_scales` makes all scales."""
        return replace(self.scales[0], dtype=torch.float32)

    def names(self, weight: str) -> list[str]:
        """What the tensors of a weight are called, the codes, which have its own name, first."""
        return [weight + suffix for suffix in self.suffixes]

    def amax_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of those maxima for a matrix whose true size is [rows, cols]."""
        return self.maxima.shape(rows, cols)

    def empty(self, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensors:
        """Uninitialized tensors for a matrix whose true size is [rows, cols]."""
        return tuple(torch.empty(each.shape(rows, cols), dtype=each.dtype, device=device) for each in self.tensors)

    def code_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the code tensor of a matrix whose true size is [rows, cols]."""
        return self.tensors[0].shape(rows, cols)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the first scale tensor of a matrix whose true size is [rows, cols]."""
        return self.scales[0].shape(rows, cols)

    @property
    def packed(self) -> int:
        """Codes that are packed together into whole bytes: 2 of four bits, 4 of six, 1 of eight."""
        return 8 // math.gcd(8, self.code_bits)

    @property
    def whole_rows(self) -> bool:
        """Whether rows can be quantized only whole, because maxima of their parts do not tell their scales."""
        return False

    @property
    def read_as(self) -> WeightFormat:
        """The format whose kernels read its codes: itself, or that of the blocks whose rows have a multiplier."""
        return self

    @property
    def scale_element(self) -> str:
        """The type of a scale: "e8m0", "e4m3", "float", or "affine", a float that a zero point stands beside."""
        return "affine" if self.scale_words == 2 else _SCALE_ELEMENTS.get(self.scale_dtype, "float")

    @property
    def scale_modes(self) -> tuple[str, ...]:
        """The ways in which its scales can be chosen."""
        return ("default",) if self.family is None else self.family.scale_modes

    @property
    def mx_element(self) -> MxElement:
        """The codes of an MX format, and their scale rule."""
        return ELEMENTS[self.decoder]

    def largest_amax(self, dtype: torch.dtype) -> float:
        """The largest maximum of weights of a dtype that scales follow.

        Codes of larger ones saturate, so that all values are finite in that dtype and in BF16.
        """
        if self.family is MX:
            return self.mx_element.largest_amax(SHORT[dtype])
        return largest_extreme(SHORT[dtype]) if self.rule == "asymmetric" else LARGEST_BF16

    def bytes(self, rows: int, cols: int) -> int:
        """Bytes of all tensors of a matrix [rows, cols]."""
        return sum(each.bytes(rows, cols) for each in self.tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowMultiplied(WeightFormat):
    """A format of blocks along K whose rows have a float32 multiplier beside: weight = multiplier * what `blocks` says.

    Codes are those of `blocks`. A row of the scale tensor is one of `blocks` and then, byte by byte in little-endian
    order, the multiplier; so every view of whole rows has what belongs to them.
    """

    blocks: WeightFormat

    @cached_property
    def tensors(self) -> tuple[FormatTensor, ...]:
        """As in `blocks`, with the bytes of the multiplier."""
        return self.blocks.tensors[0], *self.scales

    @cached_property
    def scales(self) -> tuple[FormatTensor, ...]:
        """As in `blocks`, and the bytes of the multiplier."""
        (scale,) = self.blocks.scales
        return (replace(scale, beside=MULTIPLIER_BYTES),)

    @property
    def read_as(self) -> WeightFormat:
        """That of the blocks."""
        return self.blocks

    @property
    def whole_rows(self) -> bool:
        """The multiplier is that of the least squared error of a row."""
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorScaled(WeightFormat):
    """A format whose scales stand under one float32 scale of the whole tensor: weight = code * (scale * scale_2).

    Only scale_2 is made of maxima; the others are made with the codes, of any part that is whole blocks, once that is
    known.
    """

    @cached_property
    def scales(self) -> tuple[FormatTensor, ...]:
        """The scales of the blocks, and that of the tensor."""
        of_blocks = FormatTensor("_scale", self.scale_dtype, self.block_rows, self.block_cols)
        return of_blocks, FormatTensor("_scale_2", torch.float32, 0, 0)

    @cached_property
    def maxima(self) -> FormatTensor:
        """One, of the tensor."""
        return self.scales[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScaled(WeightFormat):
    """A format whose scales stand under one float32 scale of each row: weight = level * (scale * scale_2).

    Only scale_2 is made of maxima; the others are made with the codes, of any part that is whole blocks, once that is
    known.
    """

    @cached_property
    def scales(self) -> tuple[FormatTensor, ...]:
        """The scales of the blocks, and those of the rows."""
        of_blocks = FormatTensor("_scale", self.scale_dtype, self.block_rows, self.block_cols)
        return of_blocks, FormatTensor("_scale_2", torch.float32, 1, 0)

    @cached_property
    def maxima(self) -> FormatTensor:
        """One of each row."""
        return self.scales[1]


MULTIPLIER_BYTES = 4
_SCALE_ELEMENTS: Mapping[torch.dtype, str] = MappingProxyType({torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"})


def _named(name: str) -> WeightFormat:
    return FORMATS[name]


@lru_cache(maxsize=4096)
def _shapes(fmt: WeightFormat, rows: int, cols: int) -> tuple[tuple[int, int], ...]:
    return tuple(tensor.shape(rows, cols) for tensor in fmt.tensors)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


MX = Family("mx", "mx:make", "operations:NumbaMx", "mx:MxLaunches", ("default", "mse"))
"""One power of two per 32 elements along K."""
MX_ROWS = Family("mx_rows", "mxfp4_rows:make", "rows:NumbaRows")
FP8 = Family("fp8", "fp8:make", "operations:NumbaScaled", "scaled:ScaledLaunches")
FP8_FNUZ = Family("fp8_fnuz", "fp8:make", None, "scaled:ScaledLaunches")
INT8 = Family("int8", "int8:make", "operations:NumbaScaled", "scaled:ScaledLaunches")
INTEGER = Family("integer", "integer:make", "integer:NumbaIntegers", "integer:IntegerLaunches")
"""Integers with a zero point for each group of a row."""
INT4_GROUPS = replace(
    INTEGER, name="int4_groups", reference="integer_mse:make", scale_modes=MX.scale_modes, gpu_modes=MX.scale_modes
)
"""Those of four bits, in groups that are parts of a row: their scales and zero points can be searched together."""
TENSOR_SCALED = Family(
    "tensor_scaled", "nvfp4:make", "nvfp4:NumbaNvfp4", "nvfp4:Nvfp4Launches", MX.scale_modes, MX.scale_modes
)
"""Blocks along K whose scales stand under one of the tensor."""
NON_LINEAR = Family("non_linear", "nl4:make", "nl4:NumbaNl4", "nl4:Nl4Launches")
"""Levels of unequal distance, in blocks along K whose signed scales stand under one of the row."""

_FP8_OF_ROWS = "fp8 per token", "fp8 per tensor", "fp8 static"


def _mx(element: MxElement, short: str, dtype: torch.dtype, rule: str, activations: tuple[str, ...]) -> WeightFormat:
    return WeightFormat(
        *(element.name, dtype, torch.uint8, 1, 32, element.code_bits, True),
        family=MX, element=short, label=short.upper(), largest=element.largest, rule=rule, decoder=element.name,
        activations=activations,
    )  # fmt: skip


def _fp8(name: str, block_rows: int, block_cols: int, activations: tuple[str, ...]) -> WeightFormat:
    return WeightFormat(
        *(name, torch.float8_e4m3fn, torch.float32, block_rows, block_cols, 8),
        family=FP8, element="e4m3", label="E4M3", largest=448.0, rule=name, decoder="fp8", activations=activations,
    )  # fmt: skip


def _fnuz(ocp: WeightFormat) -> WeightFormat:
    """The same bits, which stand for half as much, and twice the scale."""
    return replace(
        ocp, name=f"{ocp.name}_fnuz", code_dtype=torch.float8_e4m3fnuz, family=FP8_FNUZ, element="fnuz",
        label="E4M3 FNUZ", largest=240.0, ocp=ocp,
    )  # fmt: skip


def _integer(
    name: str, bits: int, dtype: torch.dtype, group: int, rule: str, activations: tuple[str, ...] = ()
) -> WeightFormat:
    family = INT4_GROUPS if bits == 4 and group and rule == "asymmetric" else INTEGER
    return WeightFormat(
        *(name, torch.uint8, dtype, 1, group, bits),
        scale_words=2, family=family, element=f"uint{bits}", label=f"INT{bits}", rule=rule,
        largest=float((1 << bits) - 1),  # the difference of a code and a zero point
        decoder=f"uint{bits}_{SHORT[dtype]}", activations=activations,
    )  # fmt: skip


SHORT: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
)
"""What floating types are called in names."""

_E2M1_WITH = "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "fp8 static"
MXFP4 = _mx(E2M1, "e2m1", torch.uint8, "even", _E2M1_WITH)
MXFP6_E2M3 = _mx(E2M3, "e2m3", torch.uint8, "even", ("mxfp6_e2m3", "fp8 static"))
MXFP6_E3M2 = _mx(E3M2, "e3m2", torch.uint8, "even", ("mxfp6_e3m2", "fp8 static"))
MXFP8 = _mx(E4M3, "e4m3", torch.float8_e4m3fn, "rceil", ("mxfp8",))
MXFP4_ROWS = RowMultiplied(
    *("mxfp4_rows", torch.uint8, torch.uint8, 1, 0, 4),
    blocks=MXFP4, family=MX_ROWS, element="e2m1", label="E2M1", largest=MXFP4.largest, rule="least error",
    activations=_E2M1_WITH,
)  # fmt: skip
FP8_CHANNEL = _fp8("fp8_channel", 1, 0, _FP8_OF_ROWS)
FP8_TENSOR = _fp8("fp8_tensor", 0, 0, ("fp8 per tensor", "fp8 per token", "fp8 static"))
FP8_BLOCK = _fp8("fp8_block", 128, 128, ("fp8 per 1x128 group",))
FP8_CHANNEL_FNUZ, FP8_TENSOR_FNUZ, FP8_BLOCK_FNUZ = map(_fnuz, (FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK))
INT8_CHANNEL = WeightFormat(
    *("int8_channel", torch.int8, torch.float32, 1, 0, 8),
    family=INT8, element="int8", label="INT8", largest=128.0, rule="int8", decoder="int8",
    activations=("int8 per token", "int8 static"),
)  # fmt: skip
NVFP4 = TensorScaled(
    *("nvfp4", torch.uint8, torch.float8_e4m3fn, 1, 16, 4, True),
    one_maximum=True, family=TENSOR_SCALED, element="e2m1", label="E2M1", largest=MXFP4.largest, rule="nvfp4",
    decoder="nvfp4",
)  # fmt: skip
NL4 = RowScaled(
    *("nl4", torch.uint8, torch.float8_e4m3fn, 1, nl4_levels.BLOCK, 4, True),
    family=NON_LINEAR, element="nl4", label="NL4", largest=-float(nl4_levels.LEVELS[8]), rule="nl4", decoder="nl4",
)  # fmt: skip

GROUPS = (16, 32, 64, 128, 256, 0)
"""Columns that share a scale and a zero point in the integer formats; 0: the whole row."""

_INTEGER_WITH = {(4, 0): _FP8_OF_ROWS, **{(8, group): INT8_CHANNEL.activations for group in GROUPS}}
INTEGERS = tuple(
    _integer(f"int{bits}_group{group}_{short}", bits, dtype, group, "asymmetric", _INTEGER_WITH.get((bits, group), ()))
    for bits in (4, 8)
    for group in GROUPS
    for dtype, short in SHORT.items()
)
"""Unsigned codes with a scale and a zero point for each group of a row, side by side in one [rows, 2 * groups] tensor.

The scale is of the dtype that the name ends in, as checkpoints store it, and so is the zero point, a whole number that
each of them holds exactly. A symmetric format is one whose zero points are all 2^(bits - 1).
"""
INT4FP8_CHANNEL = _integer("int4fp8_channel", 4, torch.float32, 0, "symmetric", _FP8_OF_ROWS)
"""Stored and read as `int4_group0_f32` is, but quantized symmetrically: the zero points are all 8."""

FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            *(MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8, MXFP4_ROWS),
            *(FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK, INT8_CHANNEL, INT4FP8_CHANNEL),
            *(FP8_CHANNEL_FNUZ, FP8_TENSOR_FNUZ, FP8_BLOCK_FNUZ),
            *INTEGERS,
            NVFP4,
            NL4,
        )
    }
)
"""Every format by its name."""

for _each in FORMATS.values():
    _each.dtypes, _each.suffixes  # noqa: B018  # cached before `torch.compile` follows who asks for them

FNUZ: Mapping[WeightFormat, WeightFormat] = MappingProxyType(
    {fmt.ocp: fmt for fmt in FORMATS.values() if fmt.ocp is not None}
)
"""What an FP8 format is stored as where the matrix instructions take E4M3 FNUZ (gfx942)."""

SCALE_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {mode: tuple(name for name, fmt in FORMATS.items() if mode in fmt.scale_modes) for mode in MX.scale_modes}
)
"""The formats that have each way to choose scales: by the format's own rule, or by the least squared error."""
