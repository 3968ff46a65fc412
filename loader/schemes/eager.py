"""Whether a call computes here and now, for its result alone: then a kernel that torch does not see may make it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


def is_eager() -> bool:
    """No graph is traced, nothing is transformed or cast by autocast on a CPU, and no mode wants to see operations."""
    return not (
        is_compiling()
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or _get_tracing_state() is not None  # torch.jit.trace
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_autocast_enabled("cpu")
    )


def is_plain(x: Tensor) -> bool:
    """A tensor on a CPU, of no class of its own, of which no gradient is wanted."""
    return type(x) in _PLAIN and x.is_cpu and not (x.requires_grad and _is_grad_enabled())
