"""The one place that loads experts online, for every scheme."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeMismatchError
from ..geometry.layout import ShardId, WeightLayout
from ..geometry.regions import Region
from ..schemes.base import MoeQuantizationCallbacks
from .engine_calls import NOT_GIVEN, shard_of
from .parameter import QuantizedParameter, alive, materialized_in
from .quantizing import LayerProgress, RegionQuantizer
from .storage import FinalStorage
from .weight_loader import OnlineWeightLoader

SHARDS = {"w1": 0, "w3": 0, "w13": 0, "w2": 1}


class MoeOnlineWeightLoader:
    """Quantizes each expert shard's rows on arrival; a BF16 `w13` or `w2` never exists.

    `layer` holds `weight_layouts` (parameter name -> `WeightLayout`, up or gate-up first, down second) and meta
    parameters for codes and scales, as `MoEScheme.create_weights` registers them. `callbacks` do the arithmetic.
    When the last (expert, shard, rows) has arrived, `on_finished` runs in the thread that brought it, with the
    statistics and with what it has to call in the end: `callbacks.setup_kernel(layer)`, which runs by itself without
    it. `parameters` are those of the layer where they exist already, by the names of `weight_layouts`; else they are
    materialized in `storage`. Safe to call from several threads; a repeated region raises `RepeatedRegionError` unless
    `reset` announced a reload.
    """

    def __init__(
        self,
        layer: Any,
        callbacks: MoeQuantizationCallbacks,
        *,
        name: str = "experts",
        storage: FinalStorage | None = None,
        parameters: Mapping[str, QuantizedParameter] | None = None,
        on_finished: Callable[[Tensor, Callable[[], None]], None] = lambda _, setup_kernel: setup_kernel(),
    ) -> None:
        layouts: dict[str, WeightLayout] = layer.weight_layouts
        self._names = list(layouts)
        if parameters is None:
            storage = storage or FinalStorage(torch.device("cpu"))
            parameters = {
                key: materialized_in(layer, key, f"{name}.{key}", layout, storage) for key, layout in layouts.items()
            }
        reference = weakref.ref(layer)  # neither the layer nor this loader may be kept alive by their own closures

        def finish(statistics: Tensor) -> None:
            on_finished(statistics, lambda: callbacks.setup_kernel(alive(reference)))

        self.progress = LayerProgress(dict(parameters), finish)
        self._quantizer = RegionQuantizer(
            self.progress, callbacks.quantize_expert, callbacks.observe_expert, callbacks.finish_scales
        )

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *positional: Any,
        weight_name: str | None = None,
        shard_id: ShardId = NOT_GIVEN,
        expert_id: int | None = NOT_GIVEN,
        return_success: bool = False,
        region: Region | None = None,
    ) -> bool | None:
        """Take a shard of one expert, whole, or the part `region` names.

        `shard_id` is `w1` (gate), `w3` (up), `w13` (both, in the order they lie) or `w2` (down), `expert_id` the
        expert; engines may say so by position (`engine_calls`).
        """
        shard = shard_of("experts", positional, weight_name, shard_id, NOT_GIVEN, expert_id, return_success)
        bound = self.bound(self._name_of(shard.shard_id))
        if region is None:
            bound.load_shard(loaded_weight, shard.shard_id, shard.expert_id)
        else:
            bound.load_region(loaded_weight, region)
        return True if shard.return_success else None

    def reset(self) -> None:
        """Announce a reload: every region may, and must, arrive again."""
        self.progress.reset()

    def bound(self, name: str) -> OnlineWeightLoader:
        """The `weight_loader` of one parameter; all of a layer's share this loader's progress."""
        return OnlineWeightLoader(name, self._quantizer)

    def _name_of(self, shard_id: ShardId) -> str:
        if not isinstance(shard_id, str) or shard_id not in SHARDS:
            raise ShapeMismatchError(f"shard_id is {shard_id!r}; choose one of {', '.join(SHARDS)}")
        return self._names[SHARDS[shard_id]]
