"""The ranks of a model that gets new weights: all of them reload it, at the same time and from the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.distributed_c10d import Store

from ..model.parallel_plan import RankPlan
from .alone import Alone, RankSizes
from .exchange import StoredMaxima
from .forwards import leave_biases_to_first
from .watched import Watched


class Again(Watched):
    """Rank `rank` of `ranks`; a reload that failed leaves nothing in the way of the next, see `StoredMaxima`."""

    def __init__(self, rank: int, ranks: int, expert_parallel: bool, store: Callable[[], Store], members: str) -> None:
        self._maxima = StoredMaxima(rank)
        super().__init__(rank, ranks, expert_parallel, self._exchange_by_name, store, members)

    def _exchange_by_name(self, key: Hashable, maxima: Sequence[Tensor]) -> None:
        (name,) = self.called([key])  # type: ignore[list-item]
        self._maxima(name, maxima)

    def again(self) -> Alone:
        return self

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        with super().loading():
            self._maxima.begin(self.watch)
            try:
                yield
            finally:
                self._maxima.begin(None)

    def expect(self, observed: Sequence[Hashable]) -> None:
        self.agree(observed)
        self._maxima.expect()

    def reloaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        leave_biases_to_first(model, plan)
        return super().loaded(plan, model, sizes)
