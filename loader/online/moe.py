"""The one place that loads experts online, for every scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeMismatchError
from ..schemes.base import MoeQuantizationCallbacks
from ..schemes.layout import WeightLayout
from .parameter import QuantizedParameter
from .regions import Region
from .storage import FinalStorage
from .weight_loader import LayerProgress, RegionQuantizer, shard_rows

SHARDS = {"w1": 0, "w3": 0, "w13": 0, "w2": 1}


class MoeOnlineWeightLoader:
    """Quantizes each expert shard's rows on arrival; a BF16 `w13` or `w2` never exists.

    `layer` holds `weight_layouts` (parameter name -> `WeightLayout`, up or gate-up first, down second) and meta
    parameters for codes and scales, as `MoEScheme.create_weights` registers them. `callbacks` do the arithmetic.
    When the last (expert, shard, rows) has arrived, `callbacks.setup_kernel(layer)` runs, then `on_finished`, in the
    thread that brought it. Safe to call from several threads; a repeated region raises `RepeatedRegionError` unless
    `reset` announced a reload.
    """

    def __init__(
        self,
        layer: Any,
        callbacks: MoeQuantizationCallbacks,
        *,
        name: str = "experts",
        storage: FinalStorage | None = None,
        on_finished: Callable[[Tensor], None] | None = None,
    ) -> None:
        storage = storage or FinalStorage(torch.device("cpu"))
        layouts: dict[str, WeightLayout] = layer.weight_layouts
        self._names = list(layouts)
        self._layer, self._callbacks, self._on_finished = layer, callbacks, on_finished
        parameters = {
            key: QuantizedParameter(layer, key, f"{name}.{key}", layout, storage) for key, layout in layouts.items()
        }
        self.progress = LayerProgress(parameters, self._finish)
        self._quantizer = RegionQuantizer(
            self.progress, callbacks.quantize_expert, callbacks.observe_expert, callbacks.finish_scales
        )

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *,
        shard_id: str | None = None,
        expert_id: int | None = None,
        region: Region | None = None,
        name: str | None = None,
    ) -> None:
        """Take a shard of one expert, whole, or the part `region` names.

        Without `region`: `shard_id` is `w1` (gate), `w3` (up), `w2` (down) and `expert_id` the expert.
        """
        name = name or self._name_of(shard_id)
        if region is None:
            parameter = self.progress.parameters[name]
            if expert_id is None:
                raise ShapeMismatchError(f"{parameter.full_name}: a whole shard needs an expert_id")
            known = shard_id if shard_id in dict(parameter.layout.shards) else None
            region = Region(expert_id, shard_rows(parameter, known), (0, parameter.layout.columns))
        self._quantizer.load(name, loaded_weight, region)

    def observe(self, name: str, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of an expert whose scales span several pieces."""
        self._quantizer.observe(name, loaded_weight, region)

    def reset(self) -> None:
        """Announce a reload: every region may, and must, arrive again."""
        self.progress.reset()

    def bound(self, name: str) -> BoundMoeLoader:
        """The `weight_loader` of one parameter."""
        return BoundMoeLoader(self, name)

    def _name_of(self, shard_id: str | None) -> str:
        if shard_id not in SHARDS:
            raise ShapeMismatchError(f"shard_id is {shard_id!r}; choose one of {', '.join(SHARDS)}")
        return self._names[SHARDS[shard_id]]

    def _finish(self, statistics: Tensor) -> None:
        self._callbacks.setup_kernel(self._layer)
        if self._on_finished is not None:
            self._on_finished(statistics)


class BoundMoeLoader:
    """The closure attached to one experts parameter; all of a layer's share one `MoeOnlineWeightLoader`."""

    def __init__(self, loader: MoeOnlineWeightLoader, name: str) -> None:
        self._loader = loader
        self._name = name
        self.parameter = loader.progress.parameters[name]

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *,
        shard_id: str | None = None,
        expert_id: int | None = None,
        region: Region | None = None,
    ) -> None:
        self._loader(param, loaded_weight, shard_id=shard_id, expert_id=expert_id, region=region, name=self._name)

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of an expert whose scales span several pieces."""
        self._loader.observe(self._name, loaded_weight, region)

    def reset(self) -> None:
        """A reload of the layer begins."""
        self._loader.reset()
