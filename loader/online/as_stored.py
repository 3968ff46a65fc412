"""The `weight_loader` closures of weights that stay as a quantized checkpoint stores them: nothing is computed.

A parameter has one for its codes and one for each word of its scale tensor. Their regions are those of the weight the
codes stand for, so that the same routes serve them.
"""

from __future__ import annotations

import functools
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ..errors import NonFiniteWeightError, ShapeMismatchError
from ..geometry.layout import Block, ShardId
from ..geometry.regions import Interval, Region, RegionTracker
from ..kernels.formats import Tensors
from ..schemes.activations import InputScales
from ..schemes.stored.checks import check_finite
from ..schemes.stored.weights import Role, scale_roles
from .parameter import QuantizedParameter
from .sink import InPlace
from .weight_loader import ParameterLoader, load_whole_shard


class StoredProgress:
    """What has arrived of one layer; `finish` runs once, in the thread that brought the last region."""

    def __init__(self, parameters: Iterable[StoredParameter], finish: Callable[[], None]) -> None:
        # The closures hang on their parameters and hold this; a cycle would keep the memory of a model that is gone.
        self._by_role = weakref.WeakValueDictionary[tuple[int, str], StoredTensorLoader]()
        for parameter in parameters:
            for role, loader in parameter.loaders.items():
                self._by_role[id(loader.parameter), role] = loader
                loader.progress = self
        self._incomplete = {id(loader) for loader in self._by_role.values()}
        self._finish = finish
        self._lock = threading.Lock()

    def loaders_of(self, parameter: QuantizedParameter) -> Iterator[StoredTensorLoader]:
        """All closures of one parameter."""
        return (loader for loader in self._by_role.values() if loader.parameter is parameter)

    def loader(self, parameter: QuantizedParameter, role: str) -> StoredTensorLoader | None:
        """The closure of one tensor of a parameter; `None` for a role that it has no use for."""
        return self._by_role.get((id(parameter), role))

    def by_role(self, parameter: QuantizedParameter) -> dict[Role, StoredTensorLoader]:
        """The closures of one parameter by the roles of their tensors."""
        own = ((role, loader) for (number, role), loader in self._by_role.items() if number == id(parameter))
        return {cast("Role", role): loader for role, loader in own}

    def complete(self, loader: StoredTensorLoader) -> None:
        """The last region of one tensor has arrived."""
        with self._lock:
            self._incomplete.discard(id(loader))
            last = not self._incomplete
        if last:
            self._finish()

    def reset(self) -> None:
        """A reload begins."""
        with self._lock:
            self._incomplete = {id(loader) for loader in self._by_role.values()}
        for loader in self._by_role.values():
            loader.forget()


class StoredParameter:
    """The closures of one parameter: `codes`, `scale`, and `zero_point` where the checkpoint has some.

    Without those, `zero_point` is the number that stands beside each scale in formats that have one. A float scale is
    `largest_scale` at most.
    """

    def __init__(
        self, parameter: QuantizedParameter, has_zero_points: bool, zero_point: float, largest_scale: float
    ) -> None:
        roles = scale_roles(parameter.layout.format)
        filled = zero_point if "zero_point" in roles and not has_zero_points else None
        scales: dict[Role, StoredScaleLoader] = {}
        for role, place in roles.items():
            if role != "zero_point" or filled is None:
                largest = torch.inf if role == "zero_point" else largest_scale
                scales[role] = StoredScaleLoader(
                    parameter, f" {role}", place, filled if role == "scale" else None, largest
                )
        scales["scale"].beside = [loader for role, loader in scales.items() if role != "scale"]
        self.loaders: dict[Role, StoredTensorLoader] = {"codes": StoredCodesLoader(parameter, ""), **scales}


class StoredTensorLoader(ParameterLoader):
    """Takes one tensor of each weight of a parameter, once, by the region that the weight fills."""

    progress: StoredProgress

    def __init__(self, parameter: QuantizedParameter, name: str) -> None:
        layout = parameter.layout
        self.parameter = parameter
        self.supports_moe_loading = layout.experts is not None
        self.tracker = RegionTracker(name, layout.experts, layout.rows, layout.columns)

    @property
    def name(self) -> str:
        return self.tracker.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the codes, the scales, and a static input scale."""
        has_input_scale = self.progress.loader(self.parameter, "input_scale") is not None
        return self.parameter.layout.sizes + (torch.float32.itemsize,) * has_input_scale

    def load_shard(self, loaded_weight: Tensor, shard_id: ShardId, expert_id: int | None) -> None:
        load_whole_shard(self, self.parameter, loaded_weight, shard_id, expert_id)

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """Take what belongs to the rows and columns of a region, in the canonical layout."""
        self.load_experts(loaded_weight.unsqueeze(0), (region.expert,), region.rows, region.columns)

    @abstractmethod
    def load_experts(self, values: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Take what belongs to the same rows and columns of several experts: [experts, ...] in the canonical layout."""

    @abstractmethod
    def gaps(self) -> Iterator[str]:
        """What has not arrived of this tensor."""

    def missing(self) -> Iterator[str]:
        return self.gaps()

    def forget(self) -> None:
        """Nothing has arrived."""
        self.tracker.reset()

    def reset(self) -> None:
        """Announce a reload of the layer: every region may, and must, arrive again."""
        self.progress.reset()


class StoredWeightLoader(StoredTensorLoader):
    """Writes the codes, or one word of the scales, of one parameter into place."""

    def __init__(self, parameter: QuantizedParameter, suffix: str) -> None:
        super().__init__(parameter, f"{parameter.full_name}{suffix}")
        self._blocks: dict[tuple[Interval, Interval], Block] = {}

    def load_experts(self, values: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        region = Region(experts[0], rows, columns)
        block = self.block(region)
        self.tracker.claim_each(experts, rows, columns)
        self.write(values, self.parameter.stack(experts, block), experts)
        self.commit(len(experts) * region.numel)

    @abstractmethod
    def write(self, values: Tensor, targets: Tensors, experts: Sequence[int | None]) -> None:
        """Write what came of some experts to their codes or their scales, [experts, rows, columns] each."""

    def block(self, region: Region) -> Block:
        """The one block a region is; raises `ShapeMismatchError` where it has several, or cuts through scales."""
        key = region.rows, region.columns
        if key not in self._blocks:
            blocks = list(self.parameter.layout.blocks(region))
            if len(blocks) != 1:
                raise ShapeMismatchError(f"{self.name}: {region} reaches over a shard; hand over each on its own")
            self._blocks[key] = blocks[0]
        return self._blocks[key]

    def commit(self, numel: int) -> None:
        """So much of what was claimed is written."""
        if self.tracker.commit(numel):
            self.progress.complete(self)

    def gaps(self) -> Iterator[str]:
        return self.tracker.described_gaps()


class StoredCodesLoader(StoredWeightLoader):
    """The closure of a parameter's codes; it may be read into directly."""

    def write(self, values: Tensor, targets: Tensors, experts: Sequence[int | None]) -> None:
        codes = targets[0]
        _check(self.name, values, codes)
        codes.copy_(values)

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """Where the codes of a region lie contiguously in the parameter, whatever they are stored as."""
        layout = self.parameter.layout
        if region.columns != (0, layout.columns) or layout.is_padded:
            return None
        return InPlace(functools.partial(self._target, region), functools.partial(self.commit, region.numel))

    def _target(self, region: Region) -> Tensor:
        codes = self.parameter.views(region.expert, self.block(region))[0]
        self.tracker.claim(region)
        return codes.view(torch.uint8).reshape(-1)

    def missing(self) -> Iterator[str]:
        """What has not arrived, scales included."""
        for loader in self.progress.loaders_of(self.parameter):
            yield from loader.gaps()


class StoredScaleLoader(StoredWeightLoader):
    """The closure of one word of a parameter's scales; beside a scale it may have to write a constant zero point.

    `place` is the scale tensor, counted without the codes, and the word in it. `beside` are the closures of all other
    words, which may have no parameter of their own to hang on.
    """

    beside: Sequence[StoredScaleLoader] = ()

    def __init__(
        self,
        parameter: QuantizedParameter,
        suffix: str,
        place: tuple[int, int],
        zero_point: float | None,
        largest: float,
    ) -> None:
        super().__init__(parameter, suffix)
        (self._number, self._word), self._zero_point, self._largest = place, zero_point, largest

    def block(self, region: Region) -> Block:
        block = super().block(region)
        if not block.fills[self._number]:
            raise ShapeMismatchError(f"{self.name}: {region} cuts through scale blocks of the parameter")
        return block

    def write(self, values: Tensor, targets: Tensors, experts: Sequence[int | None]) -> None:
        scales, words = targets[1 + self._number], self.parameter.layout.format.scales[self._number].width
        target = scales[..., self._word :: words]
        _check(self.name, values, target)
        self._check_finite(values, experts)
        target.copy_(values)
        if self._zero_point is not None:
            scales[..., 1::words].fill_(self._zero_point)

    def _check_finite(self, values: Tensor, experts: Sequence[int | None]) -> None:
        """Check the scales of all experts at once, and where that fails those of each, to name it."""
        beside = self.parameter.layout.format.scales[self._number].beside
        try:
            check_finite(self.name, values, self._largest, beside)
        except NonFiniteWeightError:
            for own, expert in zip(values, experts, strict=True):
                name = self.name if expert is None else f"{self.name} of expert {expert}"
                check_finite(name, own, self._largest, beside)
            raise


class InputScaleLoader(StoredTensorLoader):
    """The closure of a static input scale: the largest of those that come with the weights of one parameter.

    `expected` scales come, each a tensor of one number for the region of its weight; `write` takes the last word,
    float32 [1]. Raises `RepeatedRegionError` for a second scale of the same weight.
    """

    def __init__(
        self,
        parameter: QuantizedParameter,
        name: str,
        expected: int,
        scales: InputScales,
        write: Callable[[Tensor], None],
    ) -> None:
        super().__init__(parameter, name)
        self._expected, self._scales, self._write = expected, scales, write
        self._arrived: list[Tensor] = []
        self._count = 0
        self._lock = threading.Lock()

    def load_experts(self, values: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        self.tracker.claim_each(experts, rows, columns)
        scales = values.detach().float().reshape(-1).clone()
        with self._lock:
            self._arrived.append(scales)
            self._count += len(values)
            last = self._count == self._expected
        if last:
            self._write(self._scales.collapse(torch.cat(self._arrived), self.name))
            self.progress.complete(self)

    def gaps(self) -> Iterator[str]:
        if self._count < self._expected:
            yield f"{self.name}, of which {self._count} of {self._expected} scales came"

    def forget(self) -> None:
        super().forget()
        self._arrived.clear()
        self._count = 0


def _check(name: str, values: Tensor, target: Tensor) -> None:
    if values.shape != target.shape or values.dtype != target.dtype:
        raise ShapeMismatchError(
            f"{name}: got {values.dtype} of shape {tuple(values.shape[1:])}, {target.dtype} of shape "
            f"{tuple(target.shape[1:])} belongs there"
        )
