"""Checkpoints made of tensors in memory, and the values that a stored weight stands for, each part converted whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.kernels.registry import select
from quantload.schemes.stored.read import READERS, read_stored
from quantload.schemes.stored.weights import StoredCheckpoint, StoredTensor, StoredWeight, scale_role
from torch import Tensor


def entries(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Tensors as an index has them; where they lie says nothing."""
    return {name: TensorEntry(name, t.dtype, tuple(t.shape), 0, 0, t.nbytes) for name, t in tensors.items()}


def read(quantization: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], **config: Any) -> StoredCheckpoint:
    """What is read of a checkpoint with that `quantization_config` and other fields of its config.

    Fails where a weight has a format that the support matrix does not list for the tool.
    """
    stored = read_stored(
        {**config, "quantization_config": quantization}, entries(tensors), lambda entry: tensors[entry.name]
    )
    for weight in stored.weights.values():
        assert weight.format in READERS[stored.method].formats
    return stored


def matrix(part: StoredTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A whole part as a matrix: leading dimensions flattened, a scalar or vector with one column."""
    columns = part.entry.shape[-1] if len(part.entry.shape) > 1 else 1
    return tensors[part.entry.name].view(part.entry.dtype).reshape(-1, columns)


def converted(part: StoredTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A whole part in the canonical layout."""
    stored = matrix(part, tensors)
    return stored if part.convert is None else part.convert(stored)


def dequantized(weight: StoredWeight, tensors: Mapping[str, Tensor]) -> Tensor:
    """The float32 values of a weight, in the shape it has in the model."""
    fmt, experts = weight.format, weight.experts or 1
    parts = {part.role: converted(part, tensors) for part in weight.parts}
    codes = parts["codes"].view(fmt.code_dtype).reshape(experts, *fmt.code_shape(weight.rows, weight.columns))
    scales = parts["scale"]
    assert scales.dtype is fmt.scale_dtype
    if fmt.scale_words == 2:
        zeros = parts.get("zero_point", torch.full_like(scales, weight.zero_point))
        assert zeros.dtype is fmt.scale_dtype
        scales = torch.stack((scales, zeros), dim=2).flatten(1)
    all_scales = [scales, *(parts[scale_role(scale)] for scale in fmt.scales[1:])]
    shapes = [scale.shape(weight.rows, weight.columns) for scale in fmt.scales]
    all_scales = [each.reshape(experts, *shape) for each, shape in zip(all_scales, shapes, strict=True)]
    out = torch.empty(experts, weight.rows, weight.columns)
    for e in range(experts):
        select("dequantize", fmt.name, "cpu")((codes[e], *(each[e] for each in all_scales)), out[e])
    return (out.transpose(1, 2) if weight.transposed else out).reshape(weight.shape)
