"""A load that is planned and has not read a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint.folder import Checkpoint
from .checkpoint.index import CheckpointIndex, read_index
from .checkpoint.resolve import resolved
from .checkpoint.small_tensors import SmallTensors
from .collector import collector_paused
from .cpu_kernels import import_cpu_kernels
from .memory.budget import check_budget, memory_running_out
from .memory.limits import check_room
from .memory.report import NonFiniteReport
from .model import transformers_api
from .model.attach import OnFinished, WeightLoaders, attach_weight_loaders
from .model.building import Building, FromConfig
from .model.parallel_plan import RankPlan
from .model.roles import roles
from .model.routes import CheckpointMap, Routes, build_routes, map_checkpoint, targets
from .model.skeleton import Assignment, assign_schemes
from .model.stored_sources import StoredSources, turn_conv1d
from .model.unapplied import Unapplied, find_unapplied, tell_unapplied
from .model.untying import NOTHING_UNTIED, Untied, untie
from .online.storage import FinalStorage
from .options import LoadOptions, QuantizationPolicy
from .plan import LoadPlan, loaded_parameters, plan_load, plan_without_pieces
from .ranks.alone import ALONE, Alone
from .schemes.policy import Policy, choose_policy
from .schemes.registry import SchemeFactory, choose_device
from .schemes.stored.read import read_stored

FROM_CONFIG = FromConfig()
import_cpu_kernels()

ROOM_FOR_KERNELS = 72 << 20
"""Bytes that must be left to map: LLVM, which brings compiled kernels into memory, ends the process without them.

Planning goes on meanwhile: the two together map 39 MiB for the demo model, with every kernel in numba's disk cache.
"""


@dataclass(frozen=True)
class Draft:
    """A load that is planned and has not read a weight: the model on meta, and where everything will go."""

    index: CheckpointIndex
    model: Any
    schemes: SchemeFactory
    rules: Policy
    mapped: CheckpointMap
    sources: StoredSources
    assignments: list[Assignment]
    loaders: WeightLoaders
    routes: Routes
    plan: LoadPlan
    untied: Untied = NOTHING_UNTIED
    """A head and an embedding that an override took apart."""
    unapplied: Sequence[Unapplied] = ()
    """What was asked for and changes nothing."""
    rank_plan: RankPlan = field(default_factory=lambda: RankPlan(0, 1))
    """What of the model is this rank's."""

    def __repr__(self) -> str:
        chosen = Counter(each.scheme.name if each.scheme is not None else "as stored" for each in self.assignments)
        modules = ", ".join(f"{count} {scheme}" for scheme, count in chosen.items())
        return f"<Draft of {type(self.model).__name__}: modules {modules}; {self.plan.memory!r}>"

    @property
    def replicated_bytes(self) -> int:
        """Bytes that the parameters which every rank has have in the checkpoint, as far as that is not quantized."""
        names = set(loaded_parameters(self.mapped, self.loaders)) - self.rank_plan.shares.keys()
        return sum(self.mapped.shapes.tensors[name].nbytes for name in names)

    def non_finite(self) -> list[NonFiniteReport]:
        """The weights in which something that is not finite was found so far."""
        found = self.loaders.non_finite.found()
        return [NonFiniteReport(each.name, each.nan, each.infinite, each.overflowed, each.index) for each in found]


def draft_load(
    checkpoint: Checkpoint,
    quantization: str,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    storage: FinalStorage,
    on_layer: OnFinished,
    trust_remote_code: bool,
    plan: Callable[..., LoadPlan] = plan_load,
    building: Building = FROM_CONFIG,
    ranks: Alone = ALONE,
    index: CheckpointIndex | None = None,
    begin: Callable[[str], None] = lambda _: None,
) -> Draft:
    """Everything before the first weight: schemes and kernels, index, skeleton, routes, and what `plan` makes of it.

    `building` makes the skeleton, of which `ranks` leaves what this process is to have. `index` has the tensors where
    they are known already. `begin` is told when nothing is left to do but wait for the kernels.
    """
    checkpoint.note_configs()
    if trust_remote_code:
        checkpoint.note_code()
    chosen = choose_policy(quantization, policy, checkpoint.is_quantized)
    if storage.device.type == "cpu":
        check_room(ROOM_FOR_KERNELS, "compiled kernels, before anything is read")
    schemes = SchemeFactory(storage.device, options, chosen.scale_mode)
    rules = Policy(chosen, schemes, checkpoint.is_quantized)
    with collector_paused():
        index = index or read_index(checkpoint)
    recipe = building.find(checkpoint, trust_remote_code, index.tensors)
    source_dtype = torch.float32 if checkpoint.is_quantized else recipe.dtype  # codes become float32 on their way
    with schemes.compiling(source_dtype), collector_paused():
        with SmallTensors(checkpoint, index) as read:
            stored = read_stored(checkpoint.config(), index.tensors, read)
        model, dtype = recipe.build(stored.plain.values())
        stored = turn_conv1d(model, stored)
        mapped = map_checkpoint(model, stored.entries)
        untied = untie(model, rules, stored, mapped)
        if untied.ties:
            index, stored = untied.index(index), untied.stored(stored)
            mapped = map_checkpoint(model, stored.entries)
        mapped.leftovers = replace(mapped.leftovers, overlaid=index.overlaid)
        mapped.leftovers.check(options.strict)
        reasons = roles(model)
        rank_plan = ranks.divide(model, mapped)
        sources = StoredSources(stored, mapped)
        dtype_of = transformers_api.DtypePlan(model, dtype)
        assignments = assign_schemes(model, rules, dtype, options.strict, sources, reasons)
        unapplied = find_unapplied(model, rules, assignments, options, computes=plan is not plan_without_pieces)
        tell_unapplied(unapplied, options.strict)
        schemes.warn_of_missing_scales()
        loaders = attach_weight_loaders(model, assignments, dtype_of, storage, on_layer, options.strict, dtype)
        routes = build_routes(mapped, loaders.landing)
        loaders.scale_together({name for conversion in routes.whole for name in targets(mapped, conversion)})
        ranks.scale_together(rank_plan, loaders)
        ranks.check_routes(rank_plan, mapped, routes)
        ahead = checkpoint.files.read_ahead(options, index.total_bytes)
        left = ahead.left(options)
        planned = plan(model, index, mapped, sources, routes, loaders, assignments, left, schemes)
        planned = planned.beside(ahead.buffer_bytes, ahead.library_bytes)
        planned = replace(planned, fetches=checkpoint.files.foresee(planned.reads(index.shards), options))
        begin("compile")
    return Draft(
        *(index, model, schemes, rules, mapped, sources, assignments, loaders, routes, planned, untied, unapplied),
        rank_plan,
    )


def plan_draft(
    model_id: str | Path | Checkpoint,
    quantization: str,
    *,
    device: str | torch.device,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    revision: str | None = None,
    trust_remote_code: bool = False,
    index: CheckpointIndex | None = None,
) -> Draft:
    """The draft of a load that is not made; raises what the load would raise up to there, the budget included."""
    with memory_running_out([]):
        storage = FinalStorage(choose_device(device))
        with resolved(model_id, revision) as checkpoint:
            draft = draft_load(
                *(checkpoint, quantization, policy, options, storage, lambda *_: None, trust_remote_code),
                index=index,
            )
    check_budget(draft.plan.memory, options.max_memory)
    return draft
