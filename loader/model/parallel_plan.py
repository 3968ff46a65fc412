"""What each of several ranks has of a model: transformers' own plans of tensor and expert parallelism, carried out.

A plan names modules and parameters, with `*` for numbers, and a style for each. Here a style becomes the dimension in
which a parameter is divided; what it does to a forward is in `ranks/forwards.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PolicyError, UnsupportedCheckpointError
from ..geometry.shares import Share, even_share, repeated_share
from . import transformers_api
from .coordinates import Coordinates
from .experts import is_fused_experts
from .routes import CheckpointMap, ModelShapes

# The dimension that a style divides, and into how many parts, such as gate and up, of each of which a rank has its own.
ROWS, COLUMNS, FIRST = -2, -1, 0
DIVIDED: Mapping[str, tuple[int, int]] = {
    "colwise": (ROWS, 1), "colwise_gather_output": (ROWS, 1), "colwise_rep": (ROWS, 1), "packed_colwise": (ROWS, 2),
    "rowwise": (COLUMNS, 1), "rowwise_split_input": (COLUMNS, 1), "rowwise_rep": (COLUMNS, 1),
    "packed_rowwise": (COLUMNS, 2), "embedding_rowwise": (FIRST, 1), "embedding_colwise": (COLUMNS, 1),
    "grouped_gemm": (FIRST, 1),
}  # fmt: skip
UNDIVIDED = frozenset(
    {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce", "moe_identity_expert"}
    | {"moe_tp_experts", "local_params", "ep_router", "ep_dispatch_experts"}
)
EMBEDDINGS = frozenset({"embedding_rowwise", "embedding_colwise"})
# A layer of these takes and gives what it does undivided, so that every rank may as well have all of it.
MAY_BE_WHOLE = EMBEDDINGS | {"colwise_gather_output", "colwise_rep", "rowwise_split_input"}
HOOKED = frozenset({"all_reduce", "moe_identity_expert"})
"""Styles that have to do with the forward of a module whose parameters, if any, are not divided."""
DEALT_OUT, SUMMED = "ep_dispatch_experts", "moe_tp_experts"


@dataclass(frozen=True)
class RankPlan:
    """What rank `rank` of `ranks` has: `shares` of parameters, and the `styles` of modules whose forwards need them.

    `first_experts` are the experts modules of which a rank has whole experts, with the number of its first one.
    `heads_per_kv` are attention modules with fewer key/value heads than ranks: how many heads of a rank share one.
    """

    rank: int
    ranks: int
    shares: Mapping[str, Share] = field(default_factory=dict)
    styles: Mapping[str, str] = field(default_factory=dict)
    first_experts: Mapping[str, int] = field(default_factory=dict)
    heads_per_kv: Mapping[str, int] = field(default_factory=dict)

    def is_divided_by_columns(self, module: str) -> bool:
        """Whether ranks have columns of the weight of a linear layer."""
        share = self.shares.get(f"{module}.weight")
        return share is not None and share.dim == 1


def plan_ranks(model: PreTrainedModel, rank: int, ranks: int, expert_parallel: bool = False) -> RankPlan:
    """What a rank has of a model on meta, by the model's own plans.

    Fused experts are divided as its plan of tensor parallelism says; whole experts are dealt out where that says
    nothing of them, or `expert_parallel` asks for it. Raises `UnsupportedCheckpointError` for a model without a plan
    or one that so many ranks cannot hold, `PolicyError` for `expert_parallel` without experts that a plan names.
    """
    return _Planner(model, rank, ranks, expert_parallel).plan()


class _Planner:
    """Goes through the modules of one model."""

    def __init__(self, model: PreTrainedModel, rank: int, ranks: int, expert_parallel: bool) -> None:
        self._model, self._rank, self._ranks = model, rank, ranks
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._tp, self._ep = transformers_api.parallel_plans(model)
        self._shares: dict[str, Share] = {}
        self._styles: dict[str, str] = {}
        self._first_experts: dict[str, int] = {}
        self._heads_per_kv: dict[str, int] = {}
        if not self._tp and not self._ep:
            raise UnsupportedCheckpointError(
                f"{type(model).__name__} has no plan of tensor or expert parallelism in transformers: load it in one "
                f"process"
            )
        experts = {name for name, module in self._modules.items() if self._may_be_dealt_out(name, module)}
        if expert_parallel and not experts:
            raise PolicyError(
                f"expert parallelism was asked for, and transformers has no plan of it for the experts of "
                f"{type(model).__name__}: load it without"
            )
        self._dealt_out = {name for name in experts if expert_parallel or not self._tp_divides(name)}

    def plan(self) -> RankPlan:
        for name, module in self._modules.items():
            if name in self._dealt_out:
                self._deal_out(name, module)
            else:
                self._divide(name, module)
        for name, module in self._modules.items():
            self._share_heads(name, module)
        self._keep_ties_alike()
        return RankPlan(self._rank, self._ranks, self._shares, self._styles, self._first_experts, self._heads_per_kv)

    def _may_be_dealt_out(self, name: str, module: nn.Module) -> bool:
        return is_fused_experts(module) and self._ep.get(pattern_of(name)) in (DEALT_OUT, SUMMED)

    def _tp_divides(self, name: str) -> bool:
        """Whether the plan of tensor parallelism divides a weight of an experts module."""
        return any(self._tp.get(pattern_of(f"{name}.{key}")) in DIVIDED for key in self._modules[name]._parameters)

    def _deal_out(self, name: str, module: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            if self._ep.get(pattern_of(f"{name}.{key}")) == "grouped_gemm":
                self._shares[f"{name}.{key}"] = self._even(name, FIRST, parameter.shape[0], 1, "experts")
        share = next(share for key, share in self._shares.items() if key.startswith(f"{name}."))
        self._styles[name] = DEALT_OUT
        self._first_experts[name] = share.intervals[0][0]

    def _divide(self, name: str, module: nn.Module) -> None:
        own = self._tp.get(pattern_of(name))
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}"
            style = _style(full_name, module, self._tp.get(pattern_of(full_name), own))
            divided = None if style is None else _divided(key, parameter, style)
            share = None if divided is None else self._share(full_name, parameter, str(style), *divided)
            if share is not None:
                self._shares[full_name] = share
        if is_fused_experts(module):
            self._divide_biases(name, module)
        own = _style(name, module, own)
        is_divided = any(f"{name}.{key}" in self._shares for key in module._parameters)
        if own is not None and (is_divided or own == SUMMED or own in HOOKED):
            self._styles[name] = own

    def _share(self, name: str, parameter: Tensor, style: str, dim: int, parts: int) -> Share | None:
        """What the rank has of a parameter; `None` where every rank may as well have all of it."""
        dim %= parameter.dim()
        if style in MAY_BE_WHOLE and parameter.shape[dim] % (parts * self._ranks):
            return None
        what = "rows" if dim == parameter.dim() - 2 else "columns"
        return self._even(name, dim, parameter.shape[dim], parts, what)

    def _divide_biases(self, name: str, module: Any) -> None:
        """Those of fused experts that no plan names: as the rows of their weights are."""
        for key in [*module._parameters]:
            weight = self._shares.get(f"{name}.{key.removesuffix('_bias')}")
            if not key.endswith("_bias") or weight is None or f"{name}.{key}" in self._shares:
                continue
            rows = 2 if getattr(module, "is_transposed", False) else 1
            if weight.dim == rows:
                self._shares[f"{name}.{key}"] = Share(1, weight.size, weight.intervals)
            elif weight.dim == 0:
                self._shares[f"{name}.{key}"] = weight

    def _share_heads(self, name: str, module: Any) -> None:
        """Let attention keep its heads whole, and key/value heads that are fewer than the ranks be had by several."""
        per_kv, width = getattr(module, "num_key_value_groups", None), getattr(module, "head_dim", None)
        keys = [f"{name}.{part}.{key}" for part in ("k_proj", "v_proj") for key in ("weight", "bias")]
        shared = {key: self._shares[key] for key in keys if key in self._shares}
        if not isinstance(per_kv, int) or not isinstance(width, int) or f"{name}.k_proj.weight" not in shared:
            return
        if self._styles[f"{name}.k_proj"] != "colwise":  # the heads are gathered, and may be divided anywhere
            return
        heads = shared[f"{name}.k_proj.weight"].size // width
        if heads * per_kv % self._ranks:
            raise UnsupportedCheckpointError(
                f"{name} has {heads * per_kv} attention heads, which {self._ranks} ranks cannot divide among them: "
                f"start as many ranks as divide that number"
            )
        if heads % self._ranks == 0:
            return
        for key, share in shared.items():
            repeated = repeated_share(share.dim, share.size, heads, self._rank, self._ranks)
            if repeated is None:
                raise UnsupportedCheckpointError(
                    f"{name} has {heads} key/value heads, and {self._ranks} ranks can neither divide them nor share "
                    f"each evenly: start as many ranks as divide that number, or a multiple of it"
                )
            self._shares[key] = repeated
        self._heads_per_kv[name] = heads * per_kv // self._ranks

    def _keep_ties_alike(self) -> None:
        """Tied parameters are divided in one way, or not at all."""
        ties: Mapping[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        for name, other in ties.items():
            if self._shares.get(name) != self._shares.get(other):
                for each in (name, other):
                    self._leave_whole(each)

    def _leave_whole(self, parameter: str) -> None:
        module = parameter.rpartition(".")[0]
        style = self._styles.get(module, "embedding_rowwise")
        if style not in MAY_BE_WHOLE:
            raise UnsupportedCheckpointError(
                f"{parameter} is tied to a parameter that is divided in another way: load the model in one process"
            )
        self._styles.pop(module, None)
        for key in self._modules[module]._parameters:
            self._shares.pop(f"{module}.{key}", None)

    def _even(self, name: str, dim: int, size: int, parts: int, what: str) -> Share:
        share = even_share(dim, size, self._rank, self._ranks, parts)
        if share is None:
            of = f"{size} {what}" if parts == 1 else f"{parts} times {size // parts} {what}"
            raise UnsupportedCheckpointError(
                f"{name} has {of}, which {self._ranks} ranks cannot divide evenly among them: start as many ranks as "
                f"divide that number"
            )
        return share


def pattern_of(name: str) -> str:
    """A name as plans have it: `*` for the numbers between dots."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _style(name: str, module: nn.Module, style: str | None) -> str | None:
    """The style of a module or parameter; older plans have those of linear layers for embeddings."""
    if isinstance(module, nn.Embedding) and style in ("colwise", "rowwise"):
        return f"embedding_{style}"
    if style is None or style in UNDIVIDED or style in DIVIDED:
        return style
    raise UnsupportedCheckpointError(
        f"transformers plans the style {style!r} for {name}, which quantload does not know: load the model in one "
        f"process"
    )


def _divided(key: str, parameter: Tensor, style: str) -> tuple[int, int] | None:
    """The dimension and parts in which a style divides a parameter, if it does."""
    if style not in DIVIDED:
        return None
    dim, parts = DIVIDED[style]
    if parameter.dim() > 1:
        return dim, parts
    # A bias has a number for each row of its weight; where columns are divided it is added once, after the sum.
    return None if dim == COLUMNS and key == "bias" else (COLUMNS, parts)


def divide_model(model: PreTrainedModel, mapped: CheckpointMap, plan: RankPlan) -> None:
    """Leave of a model on meta, and of the map of its checkpoint, what one rank has."""
    modules: dict[str, Any] = dict(model.named_modules())
    divided: dict[tuple[int, Share], tuple[Coordinates, Coordinates]] = {}  # layers share their coordinates
    for name, share in plan.shares.items():
        path, _, key = name.rpartition(".")
        held = modules[path]._parameters
        old = held[key]
        shape = (*old.shape[: share.dim], share.length, *old.shape[share.dim + 1 :])
        held[key] = nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=old.requires_grad)
        held[key].__dict__.update(old.__dict__)
        if name in mapped.coordinates:
            coordinates, conversion = mapped.coordinates[name]
            if (id(coordinates), share) not in divided:
                divided[id(coordinates), share] = coordinates, share.of(coordinates)  # type: ignore[assignment]
            mapped.coordinates[name] = divided[id(coordinates), share][1], conversion
    for name, heads in plan.heads_per_kv.items():
        modules[name].num_key_value_groups = heads
    for name in plan.first_experts:
        module = modules[name]
        module.num_experts = int(module._parameters["down_proj"].shape[0])
        module._is_expert_parallel = True
    mapped.shapes = ModelShapes(model)
