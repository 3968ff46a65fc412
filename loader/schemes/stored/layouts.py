"""How floating-point and INT8 weights lie in tensors: what each layout takes from a module, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...checkpoint.headers import TensorEntry
from ...errors import CheckpointError
from ...kernels.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, NVFP4, WeightFormat
from ...kernels.reference.nvfp4 import Nvfp4Codec
from .modules import FLOATS, ONE, StoredModule
from .packing import filled_up
from .weights import StoredTensor, StoredWeight

Layout = Callable[[StoredModule], StoredWeight]
"""Takes the tensors of one weight from its module, and says how they become canonical."""

FP8 = (torch.float8_e4m3fn,)
BYTES = (torch.uint8,)
E8M0 = (torch.uint8, torch.float8_e8m0fnu)


def mx(fmt: WeightFormat, codes: str = "weight", scale: str = "weight_scale") -> Layout:
    """Codes [N, K * bits / 8] in the order they are kept here, and one E8M0 byte for 32 of them [N, ceil(K / 32)].

    The last block of a row may have fewer codes; those that it lacks here are zeros.
    """
    code_dtypes = (*BYTES, torch.int8, torch.float4_e2m1fn_x2) if fmt.code_bits == 4 else (fmt.code_dtype,)
    why = f"a weight in {fmt.name}"

    def read(module: StoredModule) -> StoredWeight:
        entry = module.matrix(codes, code_dtypes, why=why)
        entry = as_bytes(entry) if entry.dtype is torch.int8 else entry
        rows, columns = entry.shape[0], entry.shape[1] * 8 // fmt.code_bits
        if columns * fmt.code_bits != entry.shape[1] * 8:
            raise CheckpointError(
                f"{entry.name} has {entry.shape[1]} bytes in a row, which are no whole number of codes of "
                f"{fmt.code_bits} bits; the config is of another checkpoint, or the tensor is damaged"
            )
        scales = as_bytes(module.shaped(scale, E8M0, (fmt.scale_shape(rows, columns),), why=why))
        lacking = fmt.code_shape(rows, columns)[1] - entry.shape[1]
        parts = StoredTensor("codes", entry, 1, filled_up(lacking) if lacking else None), StoredTensor("scale", scales)
        return module.weight(fmt, (rows, columns), parts)

    return read


def fp8_tensor(scale: str = "weight_scale") -> Layout:
    """E4M3 codes [N, K] and one scale for all of them."""

    def read(module: StoredModule) -> StoredWeight:
        why = "a weight in FP8 with one scale"
        codes = module.matrix("weight", FP8, why=why)
        scales = StoredTensor("scale", module.shaped(scale, FLOATS, ONE, why=why), 0, float32)
        return module.weight(FP8_TENSOR, codes.shape, (StoredTensor("codes", codes), scales))

    return read


def fp8_channel(scale: str = "weight_scale") -> Layout:
    """E4M3 codes [N, K] and a scale for each row, [N] or [N, 1]."""
    return _by_channel(FP8_CHANNEL, "a weight in FP8 with a scale for each row", scale)


def fp8_block(scale: str = "weight_scale") -> Layout:
    """E4M3 codes [N, K] and a scale for each 128 x 128 of them, in float or E8M0.

    The scales are [ceil(N / 128), ceil(K / 128)]; ModelOpt has a 1 after each of the two.
    """

    def read(module: StoredModule) -> StoredWeight:
        why = "a weight in FP8 with a scale for 128 x 128 codes"
        codes = module.matrix("weight", FP8, why=why)
        rows, columns = FP8_BLOCK.scale_shape(*codes.shape)
        scales = module.shaped(scale, (*FLOATS, *E8M0), ((rows, columns), (rows, 1, columns, 1)), why=why)
        scales = scales._replace(shape=(rows, columns))
        parts = (StoredTensor("codes", codes), StoredTensor("scale", scales, FP8_BLOCK.block_rows, float32))
        return module.weight(FP8_BLOCK, codes.shape, parts)

    return read


def nvfp4(codes: str, outer: str, *, divided: bool = False) -> Layout:
    """E2M1 codes [N, K / 2], an E4M3 scale for 16 of them [N, K / 16], and one for all, `outer`, in float32.

    The scale of a block is the product of both, or, with `divided`, the first divided by the second.
    """

    def read(module: StoredModule) -> StoredWeight:
        why = "a weight in NVFP4"
        entry = module.matrix(codes, (*BYTES, torch.float4_e2m1fn_x2), why=why)
        rows, columns = entry.shape[0], entry.shape[1] * 2
        if columns % NVFP4.block_cols:
            raise CheckpointError(
                f"{entry.name} has {columns} codes in a row; {why} has whole blocks of {NVFP4.block_cols}; export the "
                "checkpoint again"
            )
        scales = module.shaped("weight_scale", FP8, (NVFP4.scale_shape(rows, columns),), why=why)
        for_all = module.shaped(outer, FLOATS, ONE, why=why)
        parts = (
            StoredTensor("codes", entry),
            StoredTensor("scale", scales),
            StoredTensor("scale_2", for_all, 0, of_multiplier if divided else of_tensor),
        )
        return module.weight(NVFP4, (rows, columns), parts)

    return read


def int8_channel() -> Layout:
    """INT8 codes [N, K] and a scale for each row, [N] or [N, 1]; zero points, where there are any, must be 0."""
    return _by_channel(INT8_CHANNEL, "a weight in INT8 with a scale for each row", "weight_scale")


def int8_tensor() -> Layout:
    """INT8 codes [N, K] and one scale, which every row gets; a zero point, where there is one, must be 0."""

    def read(module: StoredModule) -> StoredWeight:
        why = "a weight in INT8 with one scale"
        codes = module.matrix("weight", (torch.int8,), why=why)
        rows = codes.shape[0]
        scale = module.shaped("weight_scale", FLOATS, ONE, why=why)
        parts = (
            StoredTensor("codes", codes),
            StoredTensor("scale", scale, 0, repeated(float32, rows)),
            *zero_points(module, "weight_zero_point", ONE, 0),
        )
        return module.weight(INT8_CHANNEL, codes.shape, parts)

    return read


def zero_points(
    module: StoredModule, tensor: str, shapes: tuple[tuple[int, ...], ...], block: int
) -> tuple[StoredTensor, ...]:
    """Zero points of a symmetric quantization, which some tools store: none, or one part that must be zero."""
    if tensor not in module:
        return ()
    entry = module.shaped(tensor, _ZERO_POINTS, shapes, why="a zero point of a symmetric quantization")
    return (StoredTensor("must_be_zero", entry, block),)


def as_bytes(entry: TensorEntry) -> TensorEntry:
    """A tensor read as the bytes it has: E8M0 scales are bytes here, whatever dtype a tool declares them as."""
    return entry._replace(dtype=torch.uint8)


def float32(stored: Tensor) -> Tensor:
    """Scales in float32, exactly: from float types, and from E8M0 bytes."""
    exponents = stored.view(torch.float8_e8m0fnu) if stored.dtype is torch.uint8 else stored
    return exponents.float().reshape(stored.shape[0] if stored.ndim else 1, -1)


def of_tensor(stored: Tensor) -> Tensor:
    """Scales of tensors in float32; NaN for a negative one, which no maximum gives."""
    scales = float32(stored)
    return torch.where(scales < 0, torch.nan, scales)


def of_multiplier(stored: Tensor) -> Tensor:
    """The tensor scale that belongs to what weights were multiplied by, in float32."""
    return Nvfp4Codec().scale_2_of(float32(stored))


@cache
def repeated(convert: Callable[[Tensor], Tensor] | None, rows: int) -> Callable[[Tensor], Tensor]:
    """What makes a scale for so many rows one for each of them, after another conversion."""

    def repeat(stored: Tensor) -> Tensor:
        return (stored if convert is None else convert(stored)).repeat_interleave(rows, 0)

    return repeat


_ZERO_POINTS = (torch.int8, torch.uint8, torch.int32, torch.int64, *FLOATS, *FP8)


def _by_channel(fmt: WeightFormat, why: str, scale: str) -> Layout:
    def read(module: StoredModule) -> StoredWeight:
        codes = module.matrix("weight", (fmt.code_dtype,), why=why)
        rows = codes.shape[0]
        parts = (
            StoredTensor("codes", codes),
            StoredTensor("scale", module.shaped(scale, FLOATS, ((rows,), (rows, 1)), why=why), 1, float32),
            *zero_points(module, "weight_zero_point", ((rows,), (rows, 1)), 1),
        )
        return module.weight(fmt, codes.shape, parts)

    return read
