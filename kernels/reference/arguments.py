"""Do the arguments of an operation fit together? Checks of shapes, dtypes and strides that every kernel makes."""

from __future__ import annotations

import torch

from ..formats import WeightFormat


def check_quantize(fmt: WeightFormat, source: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise ValueError unless `source` (or the output of dequantize), codes and scales fit together."""
    check_scales(fmt, source, scales, fmt.scale_dtype)
    expected = fmt.code_shape(*source.shape)
    if codes.shape != expected or codes.dtype != fmt.code_dtype:
        raise ValueError(
            f"{fmt.name}: codes of a {list(source.shape)} matrix must be {fmt.code_dtype} {list(expected)}, "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    if expected[1] > 1 and codes.stride(1) != 1:
        raise ValueError(f"{fmt.name}: the last dimension of codes must be contiguous, got strides {codes.stride()}")


def check_scales(fmt: WeightFormat, source: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `source` is a supported matrix and `scales` has the shape and dtype for it."""
    if source.dim() != 2 or source.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"{fmt.name}: expected a 2-D bfloat16, float16 or float32 matrix, got {source.dtype} {list(source.shape)}"
        )
    if source.shape[1] > 1 and source.stride(1) != 1:
        raise ValueError(
            f"{fmt.name}: the last dimension of the matrix must be contiguous, got strides {source.stride()}; "
            "copy it into a row-major piece first"
        )
    expected = fmt.scale_shape(*source.shape)
    if scales.shape != expected or scales.dtype != dtype:
        raise ValueError(
            f"{fmt.name}: scales of a {list(source.shape)} matrix must be {dtype} {list(expected)}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )


def check_finish(fmt: WeightFormat, amax: torch.Tensor, out: torch.Tensor | None) -> None:
    """Raise ValueError unless the scales computed from `amax` can be written into `out` (None: into `amax`)."""
    if amax.dtype != torch.float32:
        raise ValueError(f"{fmt.name}: amax must be torch.float32, got {amax.dtype}")
    target = amax if out is None else out
    if target.dtype != fmt.scale_dtype or target.shape != amax.shape:
        raise ValueError(
            f"{fmt.name}: scales must be written to a {fmt.scale_dtype} {list(amax.shape)} tensor, "
            f"got {target.dtype} {list(target.shape)}; pass one as `out`"
        )


def check_linear(
    fmt: WeightFormat,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n_rows: int,
    k: int,
) -> None:
    """Raise ValueError unless x [T, k] can be multiplied by the quantized weight [n_rows, k]."""
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{fmt.name}: expected floating x of shape [T, {k}], got {x.dtype} {list(x.shape)}")
    if codes.shape != fmt.code_shape(n_rows, k) or scales.shape != fmt.scale_shape(n_rows, k):
        raise ValueError(
            f"{fmt.name}: a [{n_rows}, {k}] weight has codes {list(fmt.code_shape(n_rows, k))} and scales "
            f"{list(fmt.scale_shape(n_rows, k))}, got {list(codes.shape)} and {list(scales.shape)}"
        )
    if bias is not None and bias.shape != (n_rows,):
        raise ValueError(f"{fmt.name}: bias must have shape [{n_rows}], got {list(bias.shape)}")
