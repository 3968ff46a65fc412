"""Maxima of matrices that ranks divide: each rank sees a part in its first pass, and scales follow from all of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.crew import leave_if_stopping
from ..errors import PolicyError, RankError
from .watch import Watch

_TURN_SECONDS = 0.05
_SPINS = 200
_SLEEP_SECONDS = 5e-4


class MaximaExchange:
    """Raises the maxima of a matrix to those of all ranks, matrix after matrix in the order of the plan.

    Readers finish their first passes in any order, while ranks can only exchange in one: a reader waits for its turn.
    That ends, as every matrix before its own was read before it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._turns: Mapping[Hashable, int] = {}
        self._next = 0
        self._turn_came = threading.Condition()

    def expect(self, order: Iterable[Hashable]) -> None:
        """What is going to be exchanged, in the order in which it will be."""
        self._turns = {key: number for number, key in enumerate(order)}
        self._next = 0

    def __call__(self, key: Hashable, maxima: Sequence[Tensor]) -> None:
        """Raise `maxima` to those of all ranks; leaves with the load that it is a part of."""
        turn = self._turns.get(key)
        if turn is None:
            raise RankError(
                "a matrix that ranks divide was observed outside of a load: such a model gets new weights on all ranks "
                "at once, with quantload.reload_weights"
            )
        with self._turn_came:
            while self._next != turn:
                leave_if_stopping()
                self._turn_came.wait(_TURN_SECONDS)
        flat = torch.cat([each.reshape(-1) for each in maxima])
        self._reduce(flat)
        for each, part in zip(maxima, flat.split([each.numel() for each in maxima]), strict=True):
            each.copy_(part.view_as(each))
        with self._turn_came:
            self._next += 1
            self._turn_came.notify_all()

    def _reduce(self, flat: Tensor) -> None:
        try:
            work = dist.all_reduce(flat, dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            spins = 0
            while not work.is_completed():
                leave_if_stopping()
                spins += 1
                time.sleep(0 if spins < _SPINS else _SLEEP_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise RankError(f"another rank is not there any more: {error}") from error


class StoredMaxima:
    """The same through the store that the ranks watch each other by: each posts its maxima, and reads those of others.

    What a collective call of a rank that failed has begun would be left in the process group for the next one; here a
    later attempt begins anew. Those who expect an order exchange by name, in whatever order they come; others have to
    come in the same order on every rank, or it is a `PolicyError`.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._watch: Watch | None = None
        self._by_name = False
        self._number = 0
        self._in_turn = threading.Lock()

    def begin(self, watch: Watch | None) -> None:
        """Exchange with those who are watched from now on, in the order in which matrices come."""
        self._watch, self._by_name, self._number = watch, False, 0

    def expect(self) -> None:
        """All ranks come with the same matrices, each from several threads."""
        self._by_name = True

    def __call__(self, name: str, maxima: Sequence[Tensor]) -> None:
        """Raise `maxima` to those of all ranks; `name` is what all of them call the matrix."""
        if self._watch is None:
            raise RankError(
                f"{name} was observed outside of a load: such a model gets new weights on all ranks at once, with "
                f"quantload.reload_weights"
            )
        if self._by_name:
            self._exchange(self._watch, f"maxima {name}", name, maxima)
            return
        with self._in_turn:
            self._number += 1
            self._exchange(self._watch, f"maxima {self._number}", name, maxima)

    def _exchange(self, watch: Watch, key: str, name: str, maxima: Sequence[Tensor]) -> None:
        flat = torch.cat([each.reshape(-1) for each in maxima]).cpu()
        head = name.encode() + b"\0"
        for other in watch.exchange(key, head + flat.numpy().tobytes()):
            called, _, values = other.partition(b"\0")
            if called != head[:-1] or len(values) != flat.nbytes:
                raise PolicyError(
                    f"the ranks were given tensors in different orders: one came to {called.decode()} while rank "
                    f"{self._rank} came to {name}; scales that they share need the same order on all of them"
                )
            torch.maximum(flat, torch.frombuffer(bytearray(values), dtype=flat.dtype), out=flat)
        for each, part in zip(maxima, flat.split([each.numel() for each in maxima]), strict=True):
            each.copy_(part.view_as(each))
