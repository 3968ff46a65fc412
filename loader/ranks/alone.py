"""A load of one process, which has nobody to agree with: what `together.Together` replaces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from ..checkpoint.index import Shard
from ..checkpoint.source import Source
from ..memory.planner import MemoryPlan
from ..model.attach import WeightLoaders
from ..model.parallel_plan import RankPlan
from ..model.routes import CheckpointMap, Routes
from ..options import LoadOptions


class RankSizes(NamedTuple):
    """What one rank read and holds, in bytes."""

    bytes_read: int
    final_bytes: int
    peak_bytes: int


class Alone:
    """What a load asks of the ranks that share its model, where there is one."""

    rank: int = 0
    ranks: int = 1
    cancel: threading.Event | None = None
    """Set where a load is to end because another rank failed."""

    @property
    def numbers(self) -> tuple[int, int] | None:
        """The own rank and how many there are, for a report; `None` where there is one."""
        return (self.rank, self.ranks) if self.ranks > 1 else None

    def again(self) -> Alone:
        """The ranks as a reload of the model asks them; where there is one, nothing is asked."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Alone:
        """Itself: it says where a process is, whatever model it has."""
        return self

    def check(self) -> None:
        """Raise `RankError` if another rank failed."""

    def loading(self) -> contextlib.AbstractContextManager[Any]:
        """Around a load: what fails inside on another rank ends it here."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def reading(
        self, source: Callable[[LoadOptions], Source], options: LoadOptions, shards: Sequence[Shard]
    ) -> Iterator[Source]:
        """Inside, the weights are read from the source that these options make."""
        yield source(options)

    def any(self, what: str, here: bool) -> bool:
        """Whether something is so on any rank; all of them ask at the same point of their loads."""
        return here

    @property
    def part(self) -> tuple[int, int, bool] | None:
        """What tells the part of the model that is loaded here from others; `None` where it is all of it."""
        return None

    def divide(self, model: Any, mapped: CheckpointMap) -> RankPlan:
        """Leave of a model on meta, and of the map of its checkpoint, what is to be loaded here."""
        return RankPlan(0, 1)

    def scale_together(self, plan: RankPlan, loaders: WeightLoaders) -> None:
        """Have scales follow from the maxima of all ranks where they are those of all."""

    def check_routes(self, plan: RankPlan, mapped: CheckpointMap, routes: Routes) -> None:
        """Raise for tensors that cannot be read in part."""

    def of_host(self, plan: MemoryPlan) -> MemoryPlan:
        """What all ranks of this machine take together."""
        return plan

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, one rank logs."""
        return contextlib.nullcontext()

    def expect(self, observed: Sequence[Hashable]) -> None:
        """The matrices that are going to be read twice, in the order in which their first passes end."""

    def loaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        """All weights are there: let the model compute with the other ranks; the sizes of all of them."""
        return []

    def reloaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        """As `loaded`, of a model that got new weights and computes with the other ranks already."""
        return []


ALONE = Alone()
