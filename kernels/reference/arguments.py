"""Do the arguments of an operation fit together? Checks of shapes, dtypes and strides that every kernel makes."""

from __future__ import annotations

import torch

from ..formats import FormatTensor, Tensors, WeightFormat


def check_quantize(fmt: WeightFormat, source: torch.Tensor, tensors: Tensors) -> None:
    """Raise ValueError unless `source` (or the output of dequantize) and the tensors of a weight fit together."""
    _check_source(fmt, source)
    rows, cols = source.shape
    for wanted, shape, tensor in zip(_known(fmt, tensors), fmt.shapes(rows, cols), tensors, strict=True):
        _check_tensor(fmt, wanted, shape, source, tensor)
    codes = tensors[0]
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        raise ValueError(f"{fmt.name}: the last dimension of codes must be contiguous, got strides {codes.stride()}")


def check_observe(fmt: WeightFormat, source: torch.Tensor, amax: torch.Tensor) -> None:
    """Raise ValueError unless `source` is a supported matrix and `amax` can hold its maxima."""
    _check_source(fmt, source)
    _check_tensor(fmt, fmt.maxima, fmt.maxima.shape(*source.shape), source, amax)


def check_finish(fmt: WeightFormat, amax: torch.Tensor, scales: Tensors) -> None:
    """Raise ValueError unless scales computed from `amax` can be written into those of `scales` that have its blocks.

    Others have a shape that `amax` alone does not tell.
    """
    if amax.dtype != torch.float32:
        raise ValueError(f"{fmt.name}: amax must be torch.float32, got {amax.dtype}")
    for wanted, scale in zip(fmt.scales, scales, strict=True):
        decided = (wanted.block_rows, wanted.block_cols) == (fmt.maxima.block_rows, fmt.maxima.block_cols)
        fits = not decided or scale.shape == amax.shape
        if scale.dtype != wanted.dtype or not fits:
            raise ValueError(
                f"{fmt.name}: scales of maxima {list(amax.shape)} must be written to a {wanted.dtype} "
                f"{list(amax.shape)} tensor, got {scale.dtype} {list(scale.shape)}"
            )


def check_linear(
    fmt: WeightFormat, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, n_rows: int, k: int
) -> None:
    """Raise ValueError unless x [T, k] can be multiplied by the quantized weight [n_rows, k]."""
    _check_activations(fmt, x, k)
    for wanted, shape, tensor in zip(_known(fmt, tensors), fmt.shapes(n_rows, k), tensors, strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"{fmt.name}: a [{n_rows}, {k}] weight has {_called(wanted)} {list(shape)}, got {list(tensor.shape)}"
            )
    if bias is not None and bias.shape != (n_rows,):
        raise ValueError(f"{fmt.name}: bias must have shape [{n_rows}], got {list(bias.shape)}")


def _check_activations(fmt: WeightFormat, x: torch.Tensor, k: int) -> None:
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"{fmt.name}: expected x of shape [T, {k}] in float32, float16 or bfloat16, got {x.dtype} {list(x.shape)}"
        )


def check_experts(
    fmt: WeightFormat,
    x: torch.Tensor,
    tensors: Tensors,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    n_rows: int,
    k: int,
) -> None:
    """Raise ValueError unless x [T, k], grouped by `offsets`, can meet the experts' weights [E, n_rows, k]."""
    _check_activations(fmt, x, k)
    known, experts = _known(fmt, tensors), tensors[0].shape[0]
    for wanted, shape, tensor in zip(known, fmt.shapes(n_rows, k), tensors, strict=True):
        if tensor.shape != (experts, *shape):
            raise ValueError(
                f"{fmt.name}: {experts} experts of [{n_rows}, {k}] have {_called(wanted)} [{experts}, "
                f"{shape[0]}, {shape[1]}], got {list(tensor.shape)}"
            )
    if bias is not None and bias.shape != (experts, n_rows):
        raise ValueError(f"{fmt.name}: bias must have shape [{experts}, {n_rows}], got {list(bias.shape)}")
    if offsets.shape != (experts + 1,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{fmt.name}: offsets of {experts} experts must be int32 or int64 [{experts + 1}], "
            f"got {offsets.dtype} {list(offsets.shape)}"
        )


def _known(fmt: WeightFormat, tensors: Tensors) -> tuple[FormatTensor, ...]:
    """The tensors of a format, when there are as many as it has."""
    if len(tensors) != len(fmt.tensors):
        names = ", ".join(f"weight{tensor.suffix}" for tensor in fmt.tensors)
        raise ValueError(f"{fmt.name}: a weight is the tensors {names}, got {len(tensors)}")
    return fmt.tensors


def _called(tensor: FormatTensor) -> str:
    """What a tensor is called in messages: `codes`, `scales`, or `scale_2` for what follows."""
    return {"": "codes", "_scale": "scales"}.get(tensor.suffix, tensor.suffix.removeprefix("_"))


def _check_source(fmt: WeightFormat, source: torch.Tensor) -> None:
    if source.dim() != 2 or source.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"{fmt.name}: expected a 2-D bfloat16, float16 or float32 matrix, got {source.dtype} {list(source.shape)}"
        )
    if source.shape[1] > 1 and source.stride(1) != 1:
        raise ValueError(
            f"{fmt.name}: the last dimension of the matrix must be contiguous, got strides {source.stride()}; "
            "copy it into a row-major piece first"
        )


def _check_tensor(
    fmt: WeightFormat,
    wanted: FormatTensor,
    expected: tuple[int, int],
    source: torch.Tensor,
    tensor: torch.Tensor,
) -> None:
    if tensor.shape != expected or tensor.dtype != wanted.dtype:
        raise ValueError(
            f"{fmt.name}: {_called(wanted)} of a {list(source.shape)} matrix must be {wanted.dtype} {list(expected)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
