"""Compile before the first product what products with quantized weights call, however many tokens there are."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels import registry as kernel_registry
from .base import LinearScheme, MoEScheme
from .kept import needed_by_kept


def prepare_products(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Compile the CPU kernels that the modules of a model call, for activations of `dtype`, unless they are there.

    On other devices kernels are compiled as they are called.
    """
    schemes = [getattr(each, "scheme", None) for each in model.modules()]
    sets = {each.quantizer.chosen: each.kernels for each in schemes if isinstance(each, LinearScheme | MoEScheme)}
    needed = (kernel_registry.needed_to_serve(kernels, device, dtype) for kernels in sets.values())
    found = [function for functions in needed for function in functions]
    kernel_registry.prepare([*found, *needed_by_kept(model.modules())])
