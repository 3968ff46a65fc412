"""How unsigned integer codes with scales and zero points for groups of a row lie in tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...checkpoint.headers import TensorEntry
from ...errors import CheckpointError
from ...kernels.formats import INTEGERS
from .layouts import Layout, float32, zero_points
from .modules import FLOATS, ONE, StoredModule
from .packing import (
    WORD,
    awq_codes,
    column_values,
    gptq_codes,
    gptq_zero_points,
    plain_bytes,
    row_values,
    unsigned_codes,
    unsigned_values,
)
from .weights import StoredTensor, StoredWeight

_WORDS = (torch.int32, torch.uint32)
_FORMATS = {(fmt.code_bits, fmt.block_cols, fmt.scale_dtype): fmt for fmt in INTEGERS}
GROUPS = tuple(sorted({fmt.block_cols for fmt in INTEGERS if fmt.block_cols}))
"""Sizes of groups; 0, the whole row, aside."""
OF_4_BITS, OF_8_BITS = (frozenset(fmt for fmt in INTEGERS if fmt.code_bits == bits) for bits in (4, 8))
"""What the layouts here make of codes of so many bits."""
INT4_FP8 = _FORMATS[4, 0, torch.float32]
"""What `int4_fp8` makes."""


def packed(bits: int, group: int, symmetric: bool) -> Layout:
    """compressed-tensors' `weight_packed` [N, ceil(K * bits / 32)] words, `weight_scale` [N, K / group].

    Asymmetric ones have `weight_zero_point` [N * bits / 32, K / group] words. A group of 0 is the whole row, and then
    `weight_shape` says what K is.
    """
    per_word = 32 // bits
    why = f"a weight packed in {bits} bits"

    def read(module: StoredModule) -> StoredWeight:
        codes = module.matrix("weight_packed", _WORDS, why=why)
        rows, words = codes.shape
        scales = module.matrix("weight_scale", FLOATS, why=why)
        columns = group * scales.shape[1] if group else _stored_columns(module, rows, words, per_word)
        _check_groups(scales, (rows, columns // group if group else 1), why)
        if -(-columns // per_word) != words:
            raise _wrong_columns(codes, words * per_word, scales, columns)
        fmt = _FORMATS[bits, group, scales.dtype]
        count = fmt.code_shape(rows, columns)[1]
        parts = [
            StoredTensor("codes", codes, 1, None if count == 4 * words else plain_bytes(count)),
            StoredTensor("scale", scales),
        ]
        if symmetric:
            parts += zero_points(module, "weight_zero_point", (scales.shape,), 1)
            return module.weight(fmt, (rows, columns), tuple(parts), zero_point=float(1 << bits - 1))
        shape = (-(-rows // per_word), scales.shape[1])
        zeros = module.shaped("weight_zero_point", _WORDS, (shape,), why=f"a zero point of {why}")
        parts.append(_packed_zero_points(zeros, rows, row_values(bits, fmt.scale_dtype), per_word))
        return module.weight(fmt, (rows, columns), tuple(parts), step=max(1, parts[-1].block))

    return read


def unpacked(bits: int, group: int, symmetric: bool) -> Layout:
    """compressed-tensors' signed codes `weight` [N, K] in INT8, `weight_scale` [N, K / group].

    Asymmetric ones have `weight_zero_point` [N, K / group] in INT8. A group of 0 is the whole row.
    """
    why = f"a weight of {bits} bits in INT8"

    def read(module: StoredModule) -> StoredWeight:
        codes = module.matrix("weight", (torch.int8,), why=why)
        rows, columns = codes.shape
        scales = module.matrix("weight_scale", FLOATS, why=why)
        if columns % (group or 1):
            raise _wrong_columns(codes, columns, scales, group * scales.shape[1])
        _check_groups(scales, (rows, columns // group if group else 1), why)
        fmt = _FORMATS[bits, group, scales.dtype]
        parts = [StoredTensor("codes", codes, 1, unsigned_codes(bits)), StoredTensor("scale", scales)]
        if symmetric:
            parts += zero_points(module, "weight_zero_point", (scales.shape,), 1)
        else:
            zeros = module.shaped("weight_zero_point", (torch.int8,), (scales.shape,), why=f"a zero point of {why}")
            parts.append(StoredTensor("zero_point", zeros, 1, unsigned_values(bits, fmt.scale_dtype)))
        return module.weight(fmt, (rows, columns), tuple(parts), zero_point=float(1 << bits - 1) if symmetric else 0.0)

    return read


def awq(group: int, zero_point: bool) -> Layout:
    """AWQ's GEMM layout: `qweight` [K, N / 8] words, `scales` [K / group, N], `qzeros` [K / group, N / 8] words."""
    why = "a weight in AWQ's GEMM layout"

    def read(module: StoredModule) -> StoredWeight:
        codes = module.matrix("qweight", _WORDS, why=why)
        columns, rows = codes.shape[0], codes.shape[1] * WORD
        if columns % (group or 2):
            raise CheckpointError(
                f"{codes.name} has {columns} rows, the columns of its weight; {why} with group_size {group or -1} has "
                f"a multiple of {group or 2}; the config is of another checkpoint, or the tensor is damaged"
            )
        groups = columns // group if group else 1
        scales = module.shaped("scales", FLOATS, ((groups, rows),), why=why)
        fmt = _FORMATS[4, group, scales.dtype]
        parts = [
            StoredTensor("codes", codes, 1, awq_codes),
            StoredTensor("scale", scales, group, _transposed),
        ]
        if zero_point:
            zeros = module.shaped("qzeros", _WORDS, ((groups, rows // WORD),), why=why)
            parts.append(StoredTensor("zero_point", zeros, group, column_values(fmt.scale_dtype)))
        return module.weight(
            fmt, (rows, columns), tuple(parts), along="columns", step=group or 2, zero_point=0.0 if zero_point else 8.0
        )

    return read


def gptq(bits: int, group: int, first_zero: int, ordered: bool) -> Layout:
    """GPTQ's `qweight` [K * bits / 32, N] words, `scales` [K / group, N], `qzeros` [K / group, N * bits / 32] words.

    The last group of a row may have fewer columns, as GPTQModel writes and reads it. A zero point is what is stored
    there plus `first_zero`. `g_idx` [K] says which group each column is in; it must be there if columns may be
    `ordered` by their activations, and may say nothing but that they are not.
    """
    per_word = 32 // bits
    why = f"a weight of {bits} bits in GPTQ's layout"

    def read(module: StoredModule) -> StoredWeight:
        codes = module.matrix("qweight", _WORDS, why=why)
        columns, rows = codes.shape[0] * per_word, codes.shape[1]
        groups = -(-columns // group) if group else 1
        scales = module.shaped("scales", FLOATS, ((groups, rows),), why=why)
        zeros = module.shaped("qzeros", _WORDS, ((groups, -(-rows // per_word)),), why=why)
        fmt = _FORMATS[bits, group, scales.dtype]
        parts = [
            StoredTensor("codes", codes, per_word, gptq_codes),
            StoredTensor("scale", scales, group, _transposed),
            StoredTensor("zero_point", zeros, group, gptq_zero_points(bits, rows, first_zero, fmt.scale_dtype)),
        ]
        if ordered or "g_idx" in module:
            order = module.shaped("g_idx", _WORDS, ((columns,),), why=f"the groups of {why}")
            parts.append(StoredTensor("order", order._replace(shape=(1, columns)), 0))
        return module.weight(fmt, (rows, columns), tuple(parts), along="columns", step=group or per_word)

    return read


def int4_fp8(unpack: Callable[[Tensor], Tensor]) -> Layout:
    """AMD Quark's INT4 over FP8: `weight` [N, K / 8] words, `weight_scale` for all, `weight_scale_2` [N].

    A weight is code * weight_scale_2 * weight_scale. The zero points it may store, eight to a word, must be 0.
    """
    why = "a weight in INT4 over FP8"

    def read(module: StoredModule) -> StoredWeight:
        codes = module.matrix("weight", _WORDS, why=why)
        rows, columns = codes.shape[0], codes.shape[1] * WORD
        outer = module.scalar("weight_scale", why=why)
        scales = module.shaped("weight_scale_2", FLOATS, ((rows,), (rows, 1)), why=why)
        parts = (
            StoredTensor("codes", codes, 1, unpack),
            StoredTensor("scale", scales, 1, lambda stored: float32(stored) * outer),
            *zero_points(module, "weight_zero_point", ONE, 0),
            *zero_points(module, "weight_zero_point_2", ((-(-rows // WORD),),), WORD),
        )
        step = max(part.block for part in parts)
        return module.weight(INT4_FP8, (rows, columns), parts, step=step, zero_point=8.0)

    return read


def _packed_zero_points(
    entry: TensorEntry, rows: int, unpack: Callable[[Tensor], Tensor], per_word: int
) -> StoredTensor:
    """Zero points packed along the rows; those of rows that do not fill the last words are read as one."""
    if rows % per_word == 0:
        return StoredTensor("zero_point", entry, per_word, unpack)
    return StoredTensor("zero_point", entry, 0, lambda words: unpack(words.reshape(entry.shape))[:rows])


def _transposed(stored: Tensor) -> Tensor:
    return stored.t()


def _stored_columns(module: StoredModule, rows: int, words: int, per_word: int) -> int:
    """K of a weight with one group a row: between what fills all words but the last, and what fills all."""
    entry = module.shaped("weight_shape", (torch.int64, torch.int32), ((2,),), why="a packed weight")
    shape = [int(size) for size in module.value(entry)]
    if shape[0] != rows or -(-shape[1] // per_word) != words:
        raise CheckpointError(
            f"{entry.name} says {shape}, but {module.name}.weight_packed has {rows} rows of {words} words of "
            f"{per_word} codes; one of the two is damaged, or num_bits is wrong"
        )
    return shape[1]


def _check_groups(scales: TensorEntry, shape: tuple[int, int], why: str) -> None:
    if scales.shape != shape:
        raise CheckpointError(
            f"{scales.name} has the shape {list(scales.shape)}; {why} needs {list(shape)} to fit its codes; the config "
            f"is of another checkpoint, or the tensor is damaged"
        )


def _wrong_columns(codes: TensorEntry, most: int, scales: TensorEntry, columns: int) -> CheckpointError:
    return CheckpointError(
        f"{codes.name} has room for {most} codes in a row, but {scales.name} has groups for {columns}: a group size "
        f"that does not divide the row, another num_bits, or a damaged tensor; correct the config, or load the "
        f"original checkpoint"
    )
