"""Layers that an engine builds and loads, quantized while it loads them: parameters, closures, and what is missing.

The engine calls the `weight_loader` of a parameter as it always does. Ours asks the engine's own (`placing`) where the
tensor goes, and gives it to an online closure: coordinates to be read later, or a tensor that is in memory already.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from ..errors import RouteError
from ..geometry.layout import Shards
from ..geometry.regions import check_no_gaps
from ..geometry.spans import Span
from ..model.attach import OnFinished, Process
from ..model.stored_sources import ModuleWeights
from ..online.as_stored import StoredCodesLoader, StoredParameter, StoredProgress
from ..online.moe import MoeOnlineWeightLoader
from ..online.parameter import QuantizedParameter, alive, held_by
from ..online.quantizing import LayerProgress, linear_quantizer
from ..online.storage import FinalStorage
from ..online.weight_loader import OnlineWeightLoader
from ..schemes.linear import QuantizedLinearScheme
from ..schemes.moe import QuantizedMoEScheme
from .arrivals import Arrivals
from .experts_host import EngineExperts
from .lazy import EngineSink, LazyTensor, Origin
from .origin import CheckpointOrigin
from .placing import Base, Place, Placements, Shadow
from .rank_maxima import Division, scale_across_ranks
from .stored_layers import stored_closures

DUMMY_SCALES = {torch.uint8: 120, torch.float8_e4m3fn: 0.5}
"""What stands for a scale near 1/100 where an engine makes weights up; floats are 0.01 themselves."""
ATTRIBUTE = "quantload_layer"
"""Where a module of an engine has its `EngineLayer`."""


class EngineParameter(nn.Parameter):
    """Codes in a layer of an engine.

    A model that sets another `weight_loader` on a weight says where tensors go in its own way: ours stays, and asks
    that one. What an engine wraps around ours is left alone. Values that are copied to the whole of it are taken as
    what the checkpoint has for the weight.
    """

    def attach(
        self, loader: Callable[..., Any], placements: Placements, copying: Callable[[Tensor, Tensor], Any]
    ) -> None:
        """Put the closure on; `copying` takes a tensor that is all of the weight."""
        self._own, self._placements, self._copying = loader, placements, copying
        self._loader: Callable[..., Any] | None = loader

    def copy_(self, other: Tensor, non_blocking: bool = False) -> EngineParameter:
        """Codes as they are, and values quantized."""
        if other.dtype == self.dtype and not isinstance(other, LazyTensor):
            super().copy_(other, non_blocking)
        else:
            self._copying(self, other)
        return self

    @property
    def weight_loader(self) -> Callable[..., Any]:
        """The closure, or what an engine has wrapped around it."""
        if self._loader is None:
            raise AttributeError("weight_loader was deleted")
        return self._loader

    @weight_loader.setter
    def weight_loader(self, loader: Callable[..., Any]) -> None:
        inner = loader
        while inner is not self._own and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        if inner is not self._own:
            self._placements.use(loader)
            loader = self._own
        self._loader = loader

    @weight_loader.deleter
    def weight_loader(self) -> None:
        self._loader = None


class EngineLayer:
    """One quantized layer of an engine: what has arrived of it, and whether a reload is coming.

    `on_finished` is told when it is complete (see `attach.OnFinished`).
    """

    def __init__(
        self,
        name: str,
        kind: Literal["linear", "experts"],
        scheme: QuantizedLinearScheme | QuantizedMoEScheme,
    ) -> None:
        self.name, self.kind, self.scheme = name, kind, scheme
        self.on_finished: OnFinished = lambda name, statistics, process: process()
        self.bytes_in = 0
        self.progress: LayerProgress | StoredProgress
        self.closures: list[EngineSink] = []
        """Of its weights."""
        self.held: list[StoredParameter] = []
        """Where it stays as stored: the closures of all of its tensors."""
        self.arrivals = Arrivals()
        self._announced = False
        self._origins: set[CheckpointOrigin] = set()

    def finish(self, statistics: Tensor | None, process: Process) -> None:
        """All of it has arrived."""
        self.on_finished(self.name, statistics, process)

    def announce(self) -> None:
        """The engine counts what it is going to load anew."""
        self._announced = True

    def begin(self, nbytes: int) -> None:
        """So many bytes come; the first ones after an announcement begin anew."""
        if self._announced:
            self._announced = False
            self.reset()
        self.bytes_in += nbytes

    def reset(self) -> None:
        """A reload begins: every part may, and must, arrive again."""
        self.progress.reset()
        self.arrivals = Arrivals()
        self._origins.clear()
        self.bytes_in = 0

    def deliver(self, closure: EngineSink, origin: Origin, places: Sequence[Place]) -> None:
        """Have the places of a source brought to a closure, when its origin sees fit."""
        if isinstance(origin, CheckpointOrigin):
            self._origins.add(origin)
        elif self.held:
            raise RouteError(
                f"{closure.name} stays as its checkpoint stores it, which only tensors of a checkpoint can be brought "
                f"to, and what an engine has made of them cannot: name a scheme, and it is quantized anew"
            )
        for source, region, *strides in places:
            origin.deliver(source, Span(closure.name, region, *strides), closure)

    def check_complete(self, may_be_made_up: bool) -> None:
        """Have all that came read, and raise `MissingWeightsError` where that is not the whole layer.

        So is a reload of a part: engines fill the tensors of a layer anew, and the rest of it would be lost. A layer of
        which nothing came is right where weights are made up, or filled in in their final form.
        """
        origins, self._origins = self._origins, set()
        for origin in origins:
            origin.flush()
        if self.bytes_in or not may_be_made_up:
            check_complete([self])

    def missing(self) -> Iterator[str]:
        """What has not arrived."""
        for closure in self.closures:
            yield from closure.missing()


def quantized_linear(
    module: nn.Module,
    name: str,
    scheme: QuantizedLinearScheme,
    shards: Shards,
    in_features: int,
    storage: FinalStorage,
    base: Base,
    dtype: torch.dtype,
    attributes: Mapping[str, Any],
    division: Division | None = None,
    stored: ModuleWeights | None = None,
) -> EngineLayer:
    """Register codes and scales of a linear layer, `shards` from top to bottom, and put a closure on the codes.

    `base` is the engine's loader, which is shown a weight of `dtype` with `attributes`; `division` says what of the
    weight other ranks have. With `stored` it stays as the checkpoint stores it.
    """
    scheme.create_weights(module, shards=shards, in_features=in_features)
    layout = scheme.layouts(module)["weight"]
    layer = EngineLayer(name, "linear", scheme)
    parameter = held_by(module, "weight", f"{name}.weight", layout, storage.device)
    if stored is not None:
        (closure,) = _as_stored(layer, module, stored, {"weight": parameter}).values()
    else:
        scale_across_ranks(parameter, division)
        process = functools.partial(_process, weakref.ref(module), scheme.process_weights_after_loading)
        progress = LayerProgress({"weight": parameter}, lambda statistics: layer.finish(statistics, process))
        closure = OnlineWeightLoader("weight", linear_quantizer(scheme, progress))
        layer.progress = progress
    shadow = Shadow((layout.rows, layout.columns), dtype, layout.shard_borders(), attributes)
    _hold(module, "weight", layer, closure, Placements(base, shadow), storage)
    setattr(module, ATTRIBUTE, layer)
    return layer


def quantized_experts(
    module: nn.Module,
    name: str,
    scheme: QuantizedMoEScheme,
    num_experts: int,
    weights: Mapping[str, tuple[Shards, int]],
    host: EngineExperts,
    storage: FinalStorage,
    base: Base,
    dtype: torch.dtype,
    local_expert: Callable[[int], int],
    attributes: Mapping[str, Any] | None = None,
    divisions: Mapping[str, Division | None] | None = None,
    stored: ModuleWeights | None = None,
) -> EngineLayer:
    """Register codes and scales of experts, up or gate-up first, and put closures on the codes.

    `weights` are the shards and columns of each weight, `host` says what they compute besides; `base`, `attributes`,
    `stored` and `divisions`, one for each weight, are as for linear layers, `local_expert` that of `Placements`.
    """
    scheme.create_weights(module, num_experts=num_experts, host=host, **weights)
    layouts = scheme.layouts(module)
    layer = EngineLayer(name, "experts", scheme)
    parameters = {key: held_by(module, key, f"{name}.{key}", layout, storage.device) for key, layout in layouts.items()}
    closures: Mapping[str, EngineSink]
    if stored is not None:
        closures = _as_stored(layer, module, stored, parameters)
    else:
        for key, parameter in parameters.items():
            scale_across_ranks(parameter, (divisions or {}).get(key))
        loader = MoeOnlineWeightLoader(module, scheme, name=name, parameters=parameters, on_finished=layer.finish)
        layer.progress = loader.progress
        closures = {key: loader.bound(key) for key in layouts}
    for key, layout in layouts.items():
        shadow = Shadow((num_experts, layout.rows, layout.columns), dtype, layout.shard_borders(), attributes or {})
        _hold(module, key, layer, closures[key], Placements(base, shadow, local_expert), storage)
    setattr(module, ATTRIBUTE, layer)
    return layer


def _as_stored(
    layer: EngineLayer, module: nn.Module, stored: ModuleWeights, parameters: Mapping[str, QuantizedParameter]
) -> dict[str, EngineSink]:
    """The closures of the codes of a layer that stays as stored, by its parameters."""
    layer.progress, layer.held = stored_closures(module, layer.scheme, stored, parameters, layer.finish)
    return {key: _codes(made) for key, made in zip(parameters, layer.held, strict=True)}


def _codes(made: StoredParameter) -> StoredCodesLoader:
    codes = made.loaders["codes"]
    assert isinstance(codes, StoredCodesLoader)
    return codes


def engine_layers(model: nn.Module) -> Iterator[tuple[nn.Module, EngineLayer]]:
    """The modules of a model that are quantized."""
    for module in model.modules():
        layer = getattr(module, ATTRIBUTE, None)
        if layer is not None:
            yield module, layer


def check_complete(layers: Iterable[EngineLayer]) -> None:
    """Raise `MissingWeightsError` naming what has not arrived of some layers."""
    gaps = (gap for layer in layers for gap in layer.missing())
    check_no_gaps(gaps, hint=". A layer is loaded, and reloaded, whole")


def weight_loader(layer: EngineLayer, closure: EngineSink, placements: Placements) -> Callable[..., Any]:
    """The `weight_loader` of a parameter: a plain function, as engines ask it for its name and its signature.

    It is called with the parameter, the tensor, and whatever the engine's own takes, and returns what that returns. A
    parameter on meta means that elements are counted: so many are copied, on meta.
    """

    def quantload_weight_loader(param: Tensor, loaded_weight: Tensor, *arguments: Any, **named: Any) -> Any:
        lazy = loaded_weight if isinstance(loaded_weight, LazyTensor) else layer.arrivals.wrap(loaded_weight)
        placed = placements.of(lazy, arguments, named)
        if param.is_meta:
            layer.announce()
            counted = torch.empty(placed.numel, device="meta")
            counted.copy_(counted)
            return placed.result
        layer.begin(placed.numel * lazy.dtype.itemsize)
        for origin, places in placed.places:
            layer.deliver(closure, origin, places)
        return placed.result

    if closure.supports_moe_loading:
        quantload_weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]
    return quantload_weight_loader


def _hold(
    module: nn.Module,
    name: str,
    layer: EngineLayer,
    closure: EngineSink,
    placements: Placements,
    storage: FinalStorage,
) -> None:
    """Put real tensors in the place of those on meta, as engines allocate before they load, and the closure on them."""
    layout = closure.parameter.layout
    codes, *scales = layout.format.names(name)
    tensors = [storage.empty(shape, dtype) for dtype, shape in layout.tensors]
    layout.clear_padding(tuple(tensors))
    held = EngineParameter(tensors[0], requires_grad=False)
    own = weight_loader(layer, closure, placements)
    layer.closures.append(closure)
    held.attach(own, placements, weight_loader(layer, closure, Placements(_copy, placements.shadow)))
    _describe(held, layout.numel, 1)
    module._parameters[codes] = held
    for key, tensor in zip(scales, tensors[1:], strict=True):
        scale: Any = nn.Parameter(tensor, requires_grad=False)
        scale.weight_loader = _refusing(f"{layer.name}.{key}")
        _describe(scale, 0, DUMMY_SCALES.get(tensor.dtype, 0.01))
        module._parameters[key] = scale


def _copy(param: Tensor, loaded_weight: Tensor) -> None:
    param.data.copy_(loaded_weight)


def _process(module: weakref.ref[nn.Module], process: Callable[[nn.Module], None]) -> None:
    process(alive(module))


def _describe(tensor: Any, numel: int, dummy: float) -> None:
    """Say to vLLM how many elements of a checkpoint fill a tensor, and what to fill it with where there is none."""
    tensor.weight_loader_numel, tensor.dummy_weight_value = numel, dummy


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(param: Tensor, *_: Any, **__: Any) -> NoReturn:
        raise RouteError(
            f"the checkpoint has a tensor for {name}, which is made while the weights are quantized; is the checkpoint "
            f"quantized already? Then name no quantization, or one that reads it"
        )

    return refuse
