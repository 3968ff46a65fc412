"""What the tensors of a stored weight must not be: each check raises an error that names the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CheckpointError, NonFiniteWeightError
from .weights import StoredWeight


def check_finite(name: str, scales: Tensor, largest: float = torch.inf, beside: int = 0) -> None:
    """Raise `NonFiniteWeightError` for a scale that is NaN or infinite; an E8M0 byte of 255 is NaN.

    So is a scale above `largest`, with which codes would be infinite in the dtype of the weight. The last `beside`
    bytes of each row are the float32 multiplier of the others.
    """
    if not scales.numel():
        return
    if beside:
        aligned = scales[..., -beside:].clone(memory_format=torch.contiguous_format)
        multiplier, top = aligned.view(torch.float32)[..., 0], scales[..., :-beside].amax(-1)
        scales = torch.ldexp(multiplier, top.float() - 127).masked_fill(top == 255, torch.nan)
    if scales.dtype == torch.uint8:
        byte = int(scales.max())
        found = torch.nan if byte == 255 else 2.0 ** (byte - 127)
    else:
        found = float(scales.float().abs().max())  # there is no maximum of FP8
    if not found < torch.inf:
        raise NonFiniteWeightError(f"{name}: a scale is NaN or infinite; the checkpoint is damaged, copy it again")
    if found > largest:
        raise NonFiniteWeightError(
            f"{name}: a scale is {found:g}; with one above {largest:g} codes are infinite in the dtype of the model; "
            f"the checkpoint is damaged, or its quantization went wrong: copy or export it again"
        )


def check_codes(name: str, codes: Tensor) -> None:
    """Raise `NonFiniteWeightError` for E4M3 codes that are NaN: 0x7F and 0xFF, the largest byte of either reading."""
    if codes.dtype != torch.float8_e4m3fn or not codes.numel():
        return
    if int(codes.view(torch.int8).amax()) == 0x7F or int(codes.view(torch.uint8).amax()) == 0xFF:
        raise NonFiniteWeightError(
            f"{name}: a code is NaN; the checkpoint is damaged, or its quantization went wrong: copy or export it again"
        )


def check_zero(name: str, values: Tensor) -> None:
    """Raise `CheckpointError` for zero points that are not zero, of a quantization that has none."""
    if bool(values.float().any()):
        raise CheckpointError(
            f"{name} is not zero everywhere, but the config says that the quantization is symmetric; "
            f"correct the config, or load the original checkpoint, which quantload quantizes while it loads"
        )


def check_order(name: str, groups: Tensor, group: int) -> None:
    """Raise `CheckpointError` for columns [.., K] that are in another group than the one of `group` they stand in."""
    in_order = torch.arange(groups.shape[-1], dtype=groups.dtype, device=groups.device) // group
    if not torch.equal(groups, in_order.expand_as(groups)):
        raise CheckpointError(
            f"{name} does not count groups of {group} columns one after the other: the columns were quantized in the "
            f"order of their activations (desc_act), which is not read; load the original checkpoint, which quantload "
            f"quantizes while it loads, or one that was quantized without desc_act"
        )


def check_shape(name: str, shapes: Tensor, weight: StoredWeight) -> None:
    """Raise `CheckpointError` for shapes [.., 2] that are not the rows and columns of a weight."""
    stored = [weight.rows, weight.columns]
    wrong = next((shape for shape in shapes.reshape(-1, 2).tolist() if shape != stored), None)
    if wrong is not None:
        raise CheckpointError(
            f"{name} says {wrong}, but {weight.codes.entry.name} and its scales are those of a weight of {stored}; one "
            f"of them is damaged, or of another checkpoint: copy or export it again"
        )
