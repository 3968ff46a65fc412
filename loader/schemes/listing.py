"""The schemes as rows, with the kernels that would serve each on a device."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import NoKernelError
from ..kernels.registry import OPERATIONS, candidates
from ..options import LoadOptions
from .registry import ENTRIES, SchemeEntry, SchemeFactory, choose_device


def list_schemes(device: str | torch.device) -> list[dict[str, Any]]:
    """One row a scheme: name, aliases, what it applies to, format, scale rule, kernels or why there are none.

    `unavailable` gives the other kernels for the kind of device, each with the reason why it cannot run.
    """
    target = choose_device(device)
    factory = SchemeFactory(target, LoadOptions())
    return [
        {
            "name": entry.name,
            "aliases": list(entry.aliases),
            "linear": entry.linear is not None,
            "experts": entry.experts is not None,
            "weights": entry.weights,
            "scale": entry.scale,
            "kernels": _kernels(entry, factory),
            "unavailable": _unavailable(entry, target),
        }
        for entry in ENTRIES
    ]


def _kernels(entry: SchemeEntry, factory: SchemeFactory) -> str:
    try:
        scheme = factory.linear(entry.name) or factory.experts(entry.name)
    except NoKernelError as error:
        return f"none: {error}"
    return "-" if scheme is None else scheme.kernel_names


def _unavailable(entry: SchemeEntry, device: torch.device) -> dict[str, str]:
    """Kernels for this kind of device that cannot run on it, with their reasons."""
    found: dict[str, str] = {}
    scheme = entry.linear or entry.experts
    if scheme is None:
        return found
    for operation in OPERATIONS:
        for kernel, reason in candidates(operation, scheme.format_name, device):
            if reason is not None and kernel.device_type in (None, device.type):
                found.setdefault(kernel.name, reason)
    return found
