"""Which linear layers that are kept become `KeptLinear`, after a load on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..schemes.eager import is_plain
from ..schemes.kept import KeptLinear, plain_kernel
from .linears import has_hooks

LEAST_ELEMENTS = 1 << 21
"""Of a weight: a smaller one is in a cache, and torch is done with it before it matters."""


def use_kernel_for_kept(model: nn.Module, kernels: Mapping[str, str]) -> None:
    """Make large linear layers of a loaded model that were left as they are `KeptLinear`, where there is a kernel.

    Those of a class of their own, with hooks, or with a forward of the instance stay. `kernels` are the kernels that
    were chosen by hand: with `linear` chosen to be another than that kernel, all stay.
    """
    kernel = plain_kernel()
    if kernel is None or kernels.get("linear", kernel.name) != kernel.name:
        return
    for module in model.modules():
        if type(module) is nn.Linear and _gains(module) and kernel.serves(module.weight):
            module.__class__ = KeptLinear


def _gains(module: nn.Linear) -> bool:
    weight = module.weight
    return weight.numel() >= LEAST_ELEMENTS and is_plain(weight.detach()) and not has_hooks(module)
