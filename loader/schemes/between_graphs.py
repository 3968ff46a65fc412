"""Calls that torch.compile does not put into a graph; importing this imports its tracer, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _called(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


call_between_graphs: Callable[..., Tensor] = torch.compiler.disable(
    _called, reason="quantload computes gradients of a quantized matmul outside of graphs"
)
