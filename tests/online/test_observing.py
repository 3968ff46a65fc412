"""The first pass: maxima of parameters that are scaled alone, and of those that get their scales together."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.kernels.formats import FP8_CHANNEL, FP8_TENSOR, WeightFormat
from quantload.online.observing import Observation, ScaleGroup, scales_are_shared
from torch import Tensor

CPU = torch.device("cpu")
ALONE = FP8_TENSOR
TOGETHER = replace(FP8_TENSOR, one_maximum=True)


@dataclass
class Observed:
    """A parameter of random values, and what its first pass found, by expert."""

    layout: WeightLayout
    seed: int
    found: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.layout.experts or 1, self.layout.rows, self.layout.columns)
        self.values = torch.randn(shape, generator=generator)

    def begin(self, group: ScaleGroup | None) -> None:
        self.observation = Observation(self.layout, CPU, group, self.finish)

    def finish(self, expert: int | None, shard: int | None, maxima: Tensor) -> None:
        assert (expert, shard) not in self.found
        self.found[expert, shard] = maxima

    def pieces(self, rows: int) -> list[Region]:
        experts = (None,) if self.layout.experts is None else range(self.layout.experts)
        return [
            Region(expert, (low, min(low + rows, self.layout.rows)), (0, self.layout.columns))
            for expert, low in itertools.product(experts, range(0, self.layout.rows, rows))
        ]

    def observe(self, region: Region) -> None:
        values = self.values[region.expert or 0, slice(*region.rows)]
        parts = []
        for block in self.layout.blocks(region):
            amax = self.observation.new_maxima(block.maxima)
            amax.fill_(values[slice(*block.rows)].abs().max())
            parts.append((block, amax))
        self.observation.add(region, parts)

    def amax(self, expert: int | None) -> list[float]:
        """Of each shard."""
        borders = self.layout.shard_borders()
        values = self.values[expert or 0].abs()
        return [float(values[low:high].max()) for low, high in itertools.pairwise(borders)]


def parameters(fmt: WeightFormat, experts: int | None, *shards: tuple[int, ...]) -> list[Observed]:
    layouts = [WeightLayout(fmt, experts, tuple((str(n), rows) for n, rows in enumerate(own)), 8) for own in shards]
    return [Observed(layout, seed) for seed, layout in enumerate(layouts)]


@given(st.randoms(use_true_random=False), st.integers(1, 9), st.sampled_from([None, 3]))
def test_a_parameter_alone_keeps_the_maximum_of_each_shard(
    order: random.Random, rows: int, experts: int | None
) -> None:
    (only,) = parameters(ALONE, experts, (5, 7))
    only.begin(None)
    regions = only.pieces(rows)
    order.shuffle(regions)
    for region in regions:
        only.observe(region)
    each = (None,) if experts is None else range(experts)
    assert set(only.found) == set(itertools.product(each, (0, 1)))
    for (expert, shard), maxima in only.found.items():
        assert shard is not None
        assert maxima.tolist() == [[only.amax(expert)[shard]]]


@given(st.randoms(use_true_random=False), st.integers(1, 9), st.sampled_from([None, 3]))
def test_those_that_are_scaled_together_get_the_largest_of_all(
    order: random.Random, rows: int, experts: int | None
) -> None:
    members = parameters(TOGETHER, experts, (8,), (3, 4), (2,))
    group = ScaleGroup([member.layout for member in members])
    for member in members:
        member.begin(group)
    pieces = [(member, region) for member in members for region in member.pieces(rows)]
    order.shuffle(pieces)
    for member, region in pieces:
        assert experts is not None or not member.found
        member.observe(region)
    for expert, shard in members[0].found:
        assert shard is None
        largest = max(max(member.amax(expert)) for member in members)
        for member in members:
            assert set(member.found[expert, None].flatten().tolist()) == {largest}
    assert all(set(member.found) == set(members[0].found) for member in members)
    assert len(members[0].found) == (experts or 1)


def test_many_threads_lose_nothing() -> None:
    members = parameters(TOGETHER, 4, (16, 16), (16,))
    group = ScaleGroup([member.layout for member in members])
    for member in members:
        member.begin(group)
    pieces = [(member, region) for member in members for region in member.pieces(1)]
    random.Random(0).shuffle(pieces)

    def work(own: list[tuple[Observed, Region]]) -> None:
        for member, region in own:
            member.observe(region)

    threads = [threading.Thread(target=work, args=(pieces[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for member, expert in itertools.product(members, range(4)):
        largest = max(max(each.amax(expert)) for each in members)
        assert set(member.found[expert, None].flatten().tolist()) == {largest}


def test_what_was_observed_before_a_reload_counts_for_nothing() -> None:
    (only,) = parameters(ALONE, None, (6,))
    only.begin(None)
    first, *rest = only.pieces(2)
    only.observe(first)
    only.observation.forget()
    only.values.mul_(0.5)
    for region in (first, *rest):
        assert not only.found
        only.observe(region)
    assert only.found[None, 0].item() == only.amax(None)[0]


def test_a_group_keeps_no_member_alive() -> None:
    layout = WeightLayout(TOGETHER, None, (("", 4),), 8)
    group = ScaleGroup([layout, layout])
    observations = [Observation(layout, CPU, group, lambda *_: None) for _ in range(2)]
    reference = weakref.ref(observations[0])
    gc.disable()
    try:
        observations.clear()
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("fmt", "shards", "grouped", "shared"),
    [
        (ALONE, 1, False, False),
        (ALONE, 2, False, False),
        (FP8_CHANNEL, 2, False, False),
        (TOGETHER, 1, False, False),
        (TOGETHER, 2, False, True),
        (TOGETHER, 1, True, True),
    ],
)
def test_when_scales_are_shared(fmt: WeightFormat, shards: int, grouped: bool, shared: bool) -> None:
    layout = WeightLayout(fmt, None, tuple((str(n), 4) for n in range(shards)), 8)
    assert scales_are_shared(layout, ScaleGroup([layout, layout]) if grouped else None) == shared
