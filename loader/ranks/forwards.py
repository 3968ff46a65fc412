"""What ranks exchange in the forward of a model that is divided among them.

Linear layers get transformers' own hooks; those take tensors that are no DTensors where a module says so. Embeddings
and experts have hooks here: transformers' own want DTensors for weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ..model.parallel_plan import DEALT_OUT, SUMMED, RankPlan
from ..model.transformers_api import parallel_style

LOCAL = "_hf_quantized_needs_local_tp"
"""What transformers' hooks ask of a module whose weights are plain tensors, a rank's own part of them."""


class _Sum(torch.autograd.Function):
    """The sum over all ranks; each rank's gradient is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def install_forwards(model: PreTrainedModel, plan: RankPlan, mesh: DeviceMesh) -> None:
    """Give the modules of a loaded model the forwards that a plan wants of them."""
    leave_biases_to_first(model, plan)
    modules = dict(model.named_modules())
    for name, style in plan.styles.items():
        module: Any = modules[name]
        setattr(module, LOCAL, True)
        if style == DEALT_OUT:
            _sum_experts(module, mesh, plan.first_experts[name])
        elif style == SUMMED:
            _sum_experts(module, mesh, None)
        elif style == "embedding_rowwise":
            _sum_embeddings(module, mesh, plan.shares[f"{name}.weight"].intervals[0])
        else:
            _keep_whole_sizes(module, name, plan)
            parallel_style(style).install_forward(module, mesh)
            if plan.is_divided_by_columns(name) and not isinstance(module, nn.Linear):
                _add_bias_after(module)


def leave_biases_to_first(model: PreTrainedModel, plan: RankPlan) -> None:
    """Let one rank alone have what is added to the outputs of experts, which are summed."""
    if plan.rank == 0:
        return
    for name, style in plan.styles.items():
        bias = model.get_submodule(name)._parameters.get("down_proj_bias") if style == SUMMED else None
        if bias is not None:
            bias.data.zero_()


def _keep_whole_sizes(module: Any, name: str, plan: RankPlan) -> None:
    """Let a module say how large its whole layer is, which hooks that gather its output ask."""
    share = plan.shares.get(f"{name}.weight")
    for attribute, dim in ("out_features", 0), ("in_features", 1), ("embedding_dim", 1):
        if share is not None and share.dim == dim and hasattr(module, attribute):
            setattr(module, attribute, share.size)


def _add_bias_after(module: Any) -> None:
    """Add the bias once, to the sum; transformers' hook would add it to a DTensor, and so wants one."""
    forward: Callable[[Tensor], Tensor] = module.forward

    def biased(x: Tensor) -> Tensor:
        bias = module._parameters["bias"]
        if bias is None:
            return forward(x)
        module._parameters["bias"] = None
        try:
            out = forward(x)
        finally:
            module._parameters["bias"] = bias
        return out.add(bias)

    module.forward = biased


def _sum_experts(module: Any, mesh: DeviceMesh, first: int | None) -> None:
    """Sum what the experts of all ranks give; `first` is the rank's first one where it has whole experts."""
    forward: Callable[..., Tensor] = module.forward
    group, count = mesh.get_group(), int(module.num_experts)

    def summed(hidden_states: Tensor, *routing: Any, **more: Any) -> Tensor:
        if first is not None:
            ids, weights = routing
            own = (ids >= first) & (ids < first + count)
            routing = torch.where(own, ids - first, count), weights.masked_fill(~own, 0)
        out: Tensor = _Sum.apply(forward(hidden_states, *routing, **more), group)  # type: ignore[no-untyped-call]
        return out

    module.forward = summed


def _sum_embeddings(module: Any, mesh: DeviceMesh, rows: tuple[int, int]) -> None:
    """Look up the tokens that a rank has, and sum: every other rank gives zeros for them."""
    forward, group, (low, high) = module.forward, mesh.get_group(), rows
    module.padding_idx = None  # it says which row is not trained, and need not be a row here

    def summed(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = (input >= low) & (input < high)
        found = forward(torch.where(own, input - low, 0), *args, **kwargs)
        out: Tensor = _Sum.apply(found.masked_fill(~own.unsqueeze(-1), 0), group)  # type: ignore[no-untyped-call]
        return out

    module.forward = summed
