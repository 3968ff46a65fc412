"""Maxima of matrices that ranks divide: each rank sees a part in its first pass, and scales follow from all of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.crew import leave_if_stopping
from ..errors import RankError

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
                "a matrix that ranks divide was observed outside of a load: weights of such a model cannot be loaded "
                "again in place; load the model anew"
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
