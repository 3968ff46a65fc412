"""A load of one rank's part of a model, however the ranks reach each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from ..errors import UnsupportedCheckpointError
from ..model.attach import WeightLoaders
from ..model.parallel_plan import RankPlan, divide_model, plan_ranks
from ..model.routes import CheckpointMap, Routes, targets
from ..online.observing import ScaleGroup
from .alone import Alone
from .scales import scales_span_ranks

Exchange = Callable[[Hashable, Sequence[Tensor]], None]
"""Called with what stands for a matrix, as `Sink.scale_group` does, and its maxima, to be raised to all ranks'."""


class Divided(Alone):
    """Rank `rank` of `ranks`; see `Alone` for what a load asks."""

    def __init__(self, rank: int, ranks: int, expert_parallel: bool, exchange: Exchange) -> None:
        self.rank, self.ranks = rank, ranks
        self._expert_parallel, self._exchange = expert_parallel, exchange
        self._spanning: dict[Hashable, str] = {}

    def divide(self, model: Any, mapped: CheckpointMap) -> RankPlan:
        plan = plan_ranks(model, self.rank, self.ranks, self._expert_parallel)
        divide_model(model, mapped, plan)
        return plan

    def scale_together(self, plan: RankPlan, loaders: WeightLoaders) -> None:
        self._spanning.clear()
        for name, share in plan.shares.items():
            landing = loaders.landing(name)
            if landing.layout is not None and scales_span_ranks(name, landing.layout, share, landing.transposed):
                group = loaders.scale_across(name, self._raise_maxima)
                if group is not None:
                    self._spanning[id(group)] = name

    def check_routes(self, plan: RankPlan, mapped: CheckpointMap, routes: Routes) -> None:
        for conversion in routes.whole:
            divided = [name for name in targets(mapped, conversion) if name in plan.shares]
            if divided:
                raise UnsupportedCheckpointError(
                    f"transformers computes {divided[0]} from whole tensors, which no rank reads: load the checkpoint "
                    f"in one process"
                )

    def exchanged(self, observed: Sequence[Any]) -> list[tuple[Hashable, int | None]]:
        """Of the matrices that are observed those whose maxima are exchanged, in the same order."""
        return [(group, expert) for group, expert in observed if group in self._spanning]

    def called(self, matrices: Sequence[tuple[Hashable, int | None]]) -> list[str]:
        """What all ranks call them."""
        return [f"{self._spanning[group]} {expert}" for group, expert in matrices]

    def _raise_maxima(self, group: ScaleGroup, expert: int | None, maxima: Sequence[Tensor]) -> None:
        self._exchange((id(group), expert), maxima)
