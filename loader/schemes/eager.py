"""Whether a call computes here and now, for its result alone: then a kernel that torch does not see may make it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C
_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager() -> bool:
    """No graph is traced, nothing is transformed or cast by autocast on a CPU, and no mode wants to see operations."""
    return not (
        torch.compiler.is_compiling()
        or _C._len_torch_function_stack()
        or _C._len_torch_dispatch_stack()
        or _C._get_tracing_state() is not None  # torch.jit.trace
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def is_plain(*tensors: Tensor) -> bool:
    """Tensors on a CPU, of no class of their own, of which no gradient is wanted."""
    with_gradients = torch.is_grad_enabled()
    return all(type(each) in _PLAIN and each.is_cpu and not (with_gradients and each.requires_grad) for each in tensors)
