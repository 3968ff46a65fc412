"""Ranks that are threads of the test's own process: what each reads and makes is what it does as a process."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from quantload import LoadOptions, QuantizationPolicy, QuantloadError
from quantload.checkpoint.crew import leave_if_stopping
from quantload.draft import FROM_CONFIG
from quantload.geometry.shares import Share
from quantload.load import load_into
from quantload.model.parallel_plan import RankPlan
from quantload.ranks.again import Again
from quantload.ranks.alone import RankSizes
from quantload.ranks.divided import Divided
from quantload.schemes.opaque import plain
from torch import Tensor
from torch._C._distributed_c10d import HashStore


class Meeting:
    """Where the threads exchange maxima, each matrix by its name."""

    def __init__(self, ranks: int) -> None:
        self._ranks, self._failed = ranks, False
        self.store = HashStore()
        self._seen: dict[str, list[list[Tensor]]] = {}
        self._came = threading.Condition()

    def fail(self) -> None:
        """A rank failed: nobody waits for it any longer."""
        with self._came:
            self._failed = True
            self._came.notify_all()

    def exchange(self, key: str, maxima: Sequence[Tensor]) -> None:
        with self._came:
            seen = self._seen.setdefault(key, [])
            seen.append([each.clone() for each in maxima])
            self._came.notify_all()
            while len(seen) < self._ranks:
                assert not self._failed
                leave_if_stopping()
                self._came.wait(0.05)
        for number, each in enumerate(maxima):
            each.copy_(torch.stack([other[number] for other in seen]).amax(0))


class Pretended(Divided):
    """One of them; new weights of its model are given to all at once, as to ranks that are processes."""

    plan: RankPlan

    def __init__(self, rank: int, ranks: int, expert_parallel: bool, meeting: Meeting) -> None:
        self._meeting = meeting

        def exchange(key: Hashable, maxima: Sequence[Tensor]) -> None:
            meeting.exchange(self.called([key])[0], maxima)  # type: ignore[list-item]

        super().__init__(rank, ranks, expert_parallel, exchange)

    def loaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        self.plan = plan
        return [sizes]

    def again(self) -> Again:
        meeting = self._meeting
        return Again(self.rank, self.ranks, self._expert_parallel, lambda: meeting.store, f"pretended {id(meeting)}")


def load_ranks(
    path: Path | str, scheme: str, ranks: int, expert_parallel: bool = False, policy: QuantizationPolicy | None = None
) -> list[tuple[Any, RankPlan]]:
    """The models of all ranks, which cannot compute, and what each of them has."""
    meeting = Meeting(ranks)

    def load(rank: int) -> tuple[Any, RankPlan]:
        own = Pretended(rank, ranks, expert_parallel, meeting)
        try:
            model = load_into(
                FROM_CONFIG, path, scheme, device="cpu", policy=policy, options=LoadOptions(workers=2), revision=None,
                trust_remote_code=False, progress=False, ranks=own,
            )  # fmt: skip
        except BaseException:
            meeting.fail()
            raise
        return model, own.plan

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(load, range(ranks)))


def on_all(parts: Sequence[tuple[Any, RankPlan]], body: Callable[[Any, int], Any]) -> list[Any]:
    """What each rank makes of its model and its number, or the error that it raises."""

    def run(rank: int) -> Any:
        try:
            return body(parts[rank][0], rank)
        except QuantloadError as error:
            return error

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


def assert_slices(whole: Any, parts: Sequence[tuple[Any, RankPlan]]) -> None:
    """Every rank has exactly its slices of the codes, scales and other tensors of the model of one process."""
    for model, plan in parts:
        for name, tensor in all_tensors(model):
            expected = dict(all_tensors(whole))[name]
            expected = _slice(whole, name, expected, plan)
            assert tensor.dtype == expected.dtype, name
            assert tensor.shape == expected.shape, (name, tensor.shape, expected.shape)
            assert torch.equal(_bits(tensor), _bits(expected)), name


def all_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model, codes and scales as they are."""
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{key}", plain(tensor).detach()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _slice(whole: Any, name: str, tensor: Tensor, plan: RankPlan) -> Tensor:
    path, _, key = name.rpartition(".")
    module = whole.get_submodule(path)
    layouts = module.scheme.layouts(module) if hasattr(module, "scheme") else {}
    for weight, layout in layouts.items():
        share = plan.shares.get(f"{path}.{weight}")
        names = layout.format.names(weight)
        if share is not None and key in names:
            transposed = getattr(module, "transposed", getattr(module, "is_transposed", False))
            return _slice_codes(layout, names.index(key), tensor, share, transposed)
    share = plan.shares.get(name)
    return tensor if share is None else share.of(tensor)


def _slice_codes(layout: Any, number: int, tensor: Tensor, share: Share, transposed: bool) -> Tensor:
    """A slice of codes or scales, of whole experts, rows or columns."""
    axis = share.dim - (layout.experts is not None)
    if axis < 0:
        return share.of(tensor)
    kind, borders = layout.format.tensors[number], layout.shard_borders()
    if axis == (1 if transposed else 0):
        firsts = [0]
        for low, high in itertools.pairwise(borders):
            firsts.append(firsts[-1] + kind.shape(high - low, layout.columns)[0])
        pieces = []
        for low, high in share.intervals:
            shard = max(i for i, border in enumerate(borders[:-1]) if border <= low)
            first, last = kind.rows(low - borders[shard], high - borders[shard])
            pieces.append(tensor[..., firsts[shard] + first : firsts[shard] + last, :])
        return torch.cat(pieces, -2)
    return torch.cat([tensor[..., kind.columns(low, high, layout.columns)] for low, high in share.intervals], -1)
