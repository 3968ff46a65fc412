"""A load of one rank's part that agrees with the loads of the others, through a store that all of them reach."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from ..checkpoint.index import Shard
from ..checkpoint.source import FileSource, Source
from ..errors import RankError
from ..memory.planner import MemoryPlan
from ..model.parallel_plan import RankPlan
from ..options import LoadOptions
from .alone import RankSizes
from .divided import Divided, Exchange
from .watch import Watch

logger = logging.getLogger("quantload")

_loads: Counter[tuple[str, int]] = Counter()
"""Loads of this process, by the ranks that took part in them and its own: each has keys of its own in the store."""


class Watched(Divided):
    """Rank `rank` of `ranks`, who are called `members` together; see `Alone` for what a load asks."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        expert_parallel: bool,
        exchange: Exchange,
        store: Callable[[], Store],
        members: str,
    ) -> None:
        super().__init__(rank, ranks, expert_parallel, exchange)
        self._store, self._members = store, members
        self._watch: Watch | None = None

    @property
    def watch(self) -> Watch:
        """Who watches the load that is going on."""
        assert self._watch is not None
        return self._watch

    def check(self) -> None:
        self.watch.raise_trouble()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        _loads[self._members, self.rank] += 1
        number = _loads[self._members, self.rank]
        watch = Watch(PrefixStore(f"quantload/{self._members}/{number}", self._store()), self.rank, self.ranks)
        self.cancel, self._watch = watch.cancel, watch
        try:
            with watch.explaining(), watch:
                yield
        finally:
            self._watch = None

    @contextlib.contextmanager
    def reading(
        self, source: Callable[[LoadOptions], Source], options: LoadOptions, shards: Sequence[Shard]
    ) -> Iterator[Source]:
        """As alone; ranks of one machine share its page cache, which the first clears up behind all of them."""
        is_first = self.rank == self.watch.local_ranks[0]
        own = source(options if is_first else replace(options, page_cache="keep"))
        with contextlib.ExitStack() as kept:
            if is_first and isinstance(own, FileSource):
                kept.enter_context(own.keeping())
                for shard in shards:  # now, as nobody could tell later what was cold
                    own.size(shard.path)
            self.watch.gather("begun", True)
            yield own
            self.watch.gather("read", True)

    def any(self, what: str, here: bool) -> bool:
        return any(self.watch.gather(what, here))

    @property
    def part(self) -> tuple[int, int, bool]:
        return self.rank, self.ranks, self._expert_parallel

    def agree(self, observed: Sequence[Hashable]) -> Sequence[Hashable]:
        """What is exchanged of the matrices that are going to be read twice: the same on all ranks, in one order."""
        matrices = self.exchanged(observed)
        digest = hashlib.sha256("\n".join(self.called(matrices)).encode()).hexdigest()
        if len({*self.watch.gather("observed", digest)}) > 1:
            raise RankError("the ranks would read the weights in different orders, so that no scale would be common")
        return matrices

    def of_host(self, plan: MemoryPlan) -> MemoryPlan:
        named = ("final_bytes", "staging_bytes", "slack_bytes", "peak_bytes")
        found = self.watch.gather("memory", {name: getattr(plan, name) for name in named})
        here = [found[rank] for rank in self.watch.local_ranks]
        return replace(plan, **{name: sum(each[name] for each in here) for name in named})

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        if self.rank == 0:
            yield
            return
        logger.addFilter(_is_error)
        try:
            yield
        finally:
            logger.removeFilter(_is_error)

    def loaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        return [RankSizes(*each) for each in self.watch.gather("loaded", sizes)]


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
