"""Scales of layers that the ranks of an engine divide: they follow from the maxima of all ranks, as in one process.

A scale of a whole tensor, or of a row whose columns are divided, is decided by elements that other ranks have. Ranks
can exchange only in one order. What comes from a checkpoint waits for the end of what the engine asks for
(`CheckpointOrigin.flush`), and is then read in the order of its files by all of them; what is in memory already is
exchanged as the engine hands it over, which all ranks have to do alike.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PolicyError, RankError
from ..kernels.formats import WeightFormat
from ..online.observing import ScaleGroup
from ..online.parameter import QuantizedParameter
from ..online.sink import Sink
from ..online.weight_loader import OnlineWeightLoader
from ..ranks.exchange import MaximaExchange
from .lazy import EngineSink


class RankMaxima:
    """Raises the maxima of matrices to those of all ranks of a process group, which has to take tensors of the CPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._exchange = MaximaExchange(group)
        self._expected: frozenset[Hashable] = frozenset()
        self._one_at_a_time = threading.Lock()

    def expect(self, matrices: Mapping[Hashable, str]) -> None:
        """What is exchanged next, in that order, by what all ranks call it; raises `RankError` where they differ."""
        names = "\n".join(matrices.values())
        digest = int.from_bytes(hashlib.sha256(names.encode()).digest()[:7])
        both = torch.tensor([digest, -digest])
        try:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise RankError(f"another rank is not there any more: {error}") from error
        if both[0] != -both[1]:
            raise RankError(
                f"the ranks would bring the weights in different orders, so that no scale would be common: here "
                f"{names.splitlines()[0]} comes first"
            )
        self._exchange.expect(matrices)
        self._expected = frozenset(matrices)

    def __call__(self, group: ScaleGroup, expert: int | None, maxima: Sequence[Tensor]) -> None:
        """Raise `maxima`, those of an expert of a group (see `observing.Exchange`)."""
        key = id(group), expert
        if key in self._expected:
            self._raise(key, maxima)
            return
        with self._one_at_a_time:
            self.expect({key: f"{[tuple(each.shape) for each in maxima]} of expert {expert}"})
            self._raise(key, maxima)
            self._expected = frozenset()

    def _raise(self, key: Hashable, maxima: Sequence[Tensor]) -> None:
        here = [each.cpu() for each in maxima]
        self._exchange(key, here)
        for each, raised in zip(maxima, here, strict=True):
            each.copy_(raised)


class Division(NamedTuple):
    """What the ranks of an engine divide a weight by, each having a part: its rows, its columns, or both.

    `maxima` are those of these ranks, `None` where they have no group of processes.
    """

    maxima: RankMaxima | None
    rows: bool = False
    columns: bool = False

    def spans_scales(self, fmt: WeightFormat) -> bool:
        """Whether some scale is that of elements of several ranks, and can be made of their maxima.

        It reaches over all rows or columns (a block of 0 of them), of which each rank has a part.
        """
        scales = fmt.scales
        return any((self.rows and not each.block_rows) or (self.columns and not each.block_cols) for each in scales)


def expert_divisions(maxima: RankMaxima | None, is_divided: bool) -> dict[str, Division]:
    """Of the weights of experts, where ranks divide each expert: the rows of the first, the columns of the second."""
    return {"w13_weight": Division(maxima, rows=is_divided), "w2_weight": Division(maxima, columns=is_divided)}


def scale_across_ranks(parameter: QuantizedParameter, division: Division | None) -> None:
    """Have the scales of a parameter follow from the maxima of all ranks, where those decide them.

    Raises `PolicyError` where the ranks cannot ask each other.
    """
    fmt = parameter.layout.format
    if division is None or not division.spans_scales(fmt):
        return
    if division.maxima is None:
        raise PolicyError(
            f"{parameter.full_name}: in {fmt.name} elements that several ranks have share a scale, and the engine has "
            f"no group of these ranks, in which they could find it: ignore the layer, or give it another scheme"
        )
    parameter.scale_group = ScaleGroup((parameter.layout,))
    parameter.scale_group.exchange = division.maxima


def is_scaled_across_ranks(sink: EngineSink) -> bool:
    """Whether other ranks have to be asked before the scales of a closure's parameter are known."""
    group = sink.parameter.scale_group
    return group is not None and group.exchange is not None


def expect_maxima(observed: Sequence[Hashable], sinks: Mapping[str, Sink]) -> None:
    """Say to those who exchange maxima which matrices are observed next, in that order (see `Planned.observed`)."""
    across: dict[Hashable, tuple[RankMaxima, str]] = {}
    for sink in sinks.values():
        group = sink.parameter.scale_group if isinstance(sink, OnlineWeightLoader) else None
        if group is not None and isinstance(group.exchange, RankMaxima):
            across[id(group)] = group.exchange, sink.name
    orders: dict[RankMaxima, dict[Hashable, str]] = defaultdict(dict)
    for matrix in observed if across else ():
        assert isinstance(matrix, tuple)
        group_id, expert = matrix
        if group_id in across:
            maxima, name = across[group_id]
            orders[maxima][matrix] = f"{name} {expert}"
    for maxima, order in orders.items():
        maxima.expect(order)
