"""The schemes as rows, with the kernels that would serve each on a device."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import NoKernelError
from ..options import LoadOptions
from .registry import ENTRIES, SchemeEntry, SchemeFactory, choose_device


def list_schemes(device: str | torch.device) -> list[dict[str, Any]]:
    """One row a scheme: name, aliases, what it applies to, format, scale rule, kernels or why there are none."""
    factory = SchemeFactory(choose_device(device), LoadOptions())
    return [
        {
            "name": entry.name,
            "aliases": list(entry.aliases),
            "linear": entry.linear is not None,
            "experts": entry.experts is not None,
            "weights": entry.weights,
            "scale": entry.scale,
            "kernels": _kernels(entry, factory),
        }
        for entry in ENTRIES
    ]


def _kernels(entry: SchemeEntry, factory: SchemeFactory) -> str:
    try:
        scheme = factory.linear(entry.name) or factory.experts(entry.name)
    except NoKernelError as error:
        return f"none: {error}"
    return "-" if scheme is None else scheme.kernel_names
