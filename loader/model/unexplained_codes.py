"""Codes in a checkpoint whose config does not say what they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..checkpoint.headers import TensorEntry
from ..errors import CheckpointError
from ..schemes.stored.weights import StoredWeight
from .transformers_api import Conversion

VALUES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What the values of a parameter are stored as."""


def unexplained(entry: TensorEntry, parameter: str) -> CheckpointError:
    """The error for a tensor of codes where `parameter` is made of values."""
    return CheckpointError(
        f"checkpoint tensor {entry.name} is {entry.dtype}, which holds codes and not the values of {parameter}, "
        f"and no quantization_config in config.json says what they stand for: use the config.json that belongs to "
        f"this checkpoint, or the checkpoint that it was quantized from"
    )


def explained_within(conversion: Conversion) -> set[str]:
    """Checkpoint names of a conversion that are codes or scales which its own operation decodes.

    Codes and their scales arrive together: transformers then knows what the codes stand for, whatever the config says.
    """
    names = {*conversion.names()}
    scales = {name: codes for name in names if (codes := name.rpartition("_scale")[0]) in names}
    return {*scales, *scales.values()}


def check_scales(
    surplus: Iterable[str], conversions: Iterable[Conversion], tensors: Mapping[str, TensorEntry | StoredWeight]
) -> None:
    """Raise `CheckpointError` if `surplus`, tensors that no parameter takes, has the scales of codes that one takes.

    The scales of `q_proj.weight` are `q_proj.weight_scale`, `q_proj.weight_scale_inv` and the like.
    """
    scaled = {name.rpartition("_scale")[0] for name in surplus}
    for conversion in conversions:
        for name in conversion.names():
            entry = tensors[name]
            if name in scaled and isinstance(entry, TensorEntry) and entry.dtype not in VALUES:
                raise unexplained(entry, conversion.target)
