"""A load of one process, which has nobody to agree with: what `together.Together` replaces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Sequence
from typing import Any

from ..model.attach import WeightLoaders
from ..model.parallel_plan import RankPlan
from ..model.routes import CheckpointMap, Routes
from ..options import LoadOptions


class Alone:
    """What a load asks of the ranks that share its model, where there is one."""

    rank: int = 0
    ranks: int = 1
    cancel: threading.Event | None = None
    """Set where a load is to end because another rank failed."""

    def loading(self) -> contextlib.AbstractContextManager[Any]:
        """Around a load: what fails inside on another rank ends it here."""
        return contextlib.nullcontext()

    def options(self, options: LoadOptions) -> LoadOptions:
        """How a load runs here."""
        return options

    def divide(self, model: Any, mapped: CheckpointMap) -> RankPlan:
        """Leave of a model on meta, and of the map of its checkpoint, what is to be loaded here."""
        return RankPlan(0, 1)

    def scale_together(self, plan: RankPlan, loaders: WeightLoaders) -> None:
        """Have scales follow from the maxima of all ranks where they are those of all."""

    def check_routes(self, plan: RankPlan, mapped: CheckpointMap, routes: Routes) -> None:
        """Raise for tensors that cannot be read in part."""

    def expect(self, observed: Sequence[Hashable]) -> None:
        """The matrices that are going to be read twice, in the order in which their first passes end."""

    def loaded(self, plan: RankPlan, model: Any, bytes_read: int) -> list[int]:
        """All weights are there: let the model compute with the other ranks; the bytes that each has read."""
        return []


ALONE = Alone()
