"""Put a `weight_loader` closure on every parameter of a skeleton."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..geometry.regions import check_no_gaps
from ..geometry.spans import Landing
from ..online.as_stored import InputScaleLoader, StoredParameter, StoredProgress
from ..online.moe import MoeOnlineWeightLoader
from ..online.non_finite import NonFiniteValues, look_at_codes, may_overflow
from ..online.observing import Exchange, ScaleGroup
from ..online.parameter import QuantizedParameter, alive, materialize, materialized_in
from ..online.quantizing import LayerProgress, linear_quantizer
from ..online.storage import FinalStorage
from ..online.weight_loader import DirectWeightLoader, OnlineWeightLoader, ParameterLoader, RestorableLoader
from ..schemes.activations import InputScales
from ..schemes.base import LinearScheme
from ..schemes.opaque import plain
from ..schemes.stored.weights import Role, scale_role
from .merged_modules import merged_modules
from .quantized import CodedModule
from .skeleton import Assignment
from .stored_sources import ModuleWeights

DtypeOf = Callable[[str, torch.dtype], torch.dtype]
Process = Callable[[], None]
OnFinished = Callable[[str, Tensor | None, Process], None]
"""Called with a module's name, the statistics of its weights (None where nothing was quantized), and what brings them
to where its kernel wants them: that must be called, from any thread, once nobody needs the weights where they are."""


class WeightLoaders:
    """The closures of one model: where each parameter is written, and what has not arrived."""

    def __init__(self, strict: bool = False) -> None:
        self.non_finite = NonFiniteValues(strict)
        """What is found in weights that keep their values."""
        self.sinks: dict[str, ParameterLoader] = {}
        self.as_is: dict[str, Mapping[Role, ParameterLoader]] = {}
        """Of parameters that stay as the checkpoint stores them: the closure of each of its tensors, by its role."""
        self.restorable: dict[str, RestorableLoader] = {}
        """All others."""
        self.whole_numbers: set[str] = set()
        """Buffers that the model makes of whole numbers, whatever dtype transformers gives them: counts, no codes."""
        self._one_maximum: dict[str, QuantizedParameter] = {}
        self.params: dict[str, Tensor] = {}
        self._landings: dict[str, Landing] = {}
        self._covers: dict[str, list[str]] = {}

    def landing(self, parameter: str) -> Landing:
        """The coordinates a parameter is written in."""
        return self._landings[parameter]

    def stored_names(self, parameter: str) -> list[str]:
        """The model's own names of what one checkpoint-precision parameter became: codes and scales, or itself."""
        return self._covers[parameter]

    def check_complete(self, expected: Iterable[str]) -> None:
        """Raise `MissingWeightsError` naming every region of `expected` parameters that has not arrived."""
        check_no_gaps(gap for name in expected for gap in self.sinks[name].missing())

    def add(self, name: str, param: Tensor, loader: RestorableLoader, landing: Landing, stored: list[str]) -> None:
        """Attach a closure to a parameter and remember where it writes."""
        self.restorable[name] = loader
        self._add(name, param, loader, landing, stored)

    def add_as_is(
        self,
        name: str,
        param: Tensor,
        loaders: Mapping[Role, ParameterLoader],
        landing: Landing,
        stored: list[str],
    ) -> None:
        """Attach the closures of a parameter that stays as the checkpoint stores it."""
        self.as_is[name] = loaders
        self._add(name, param, loaders["codes"], landing, stored)

    def add_one_maximum(self, module: str, parameter: QuantizedParameter) -> None:
        """The weight of a linear layer that has one maximum with those that engines run with it."""
        self._one_maximum[module] = parameter

    def scale_across(self, name: str, exchange: Exchange) -> ScaleGroup | None:
        """Have the scales of a parameter follow from maxima that `exchange` raises; the group that it is in.

        `None` where its scales are not made here: it is copied as it is stored. Comes after `scale_together`.
        """
        sink = self.sinks[name]
        if not isinstance(sink, OnlineWeightLoader):
            return None
        group = sink.parameter.scale_group or ScaleGroup((sink.parameter.layout,))
        group.exchange, sink.parameter.scale_group = exchange, group
        return group

    def scale_together(self, apart: Container[str]) -> None:
        """Put the weights of layers that engines run as one into a group, where all of them are of one format.

        Parameters in `apart` do not come piece by piece, so that they cannot be observed with others: layers with one
        of them are scaled for themselves.
        """
        for names in merged_modules(self._one_maximum):
            members = [self._one_maximum[name] for name in names]
            formats = {member.layout.format.name for member in members}
            if len(formats) == 1 and not any(member.full_name in apart for member in members):
                group = ScaleGroup([member.layout for member in members])
                for member in members:
                    member.scale_group = group

    def _add(self, name: str, param: Tensor, loader: ParameterLoader, landing: Landing, stored: list[str]) -> None:
        param.weight_loader = loader  # type: ignore[attr-defined]
        self.sinks[name], self.params[name] = loader, param
        self._landings[name] = landing
        self._covers[name] = stored


def attach_weight_loaders(
    model: PreTrainedModel,
    assignments: Iterable[Assignment],
    dtype_of: DtypeOf,
    storage: FinalStorage,
    on_finished: OnFinished,
    strict: bool = False,
    dtype: torch.dtype = torch.float32,
) -> WeightLoaders:
    """Closures for every parameter and persistent buffer; quantizing ones for modules with a scheme.

    `on_finished` runs once a layer, in the thread that brought its last piece. `strict`: NaN and infinities in weights
    that keep their values are an error. `dtype` is the one that the model computes in.
    """
    loaders, input_scales = WeightLoaders(strict), InputScales()
    for assignment in assignments:
        if assignment.scheme is not None:
            finished = _looking(loaders.non_finite, assignment, dtype, on_finished)
            _attach_quantized(loaders, assignment, storage, input_scales, finished)
    quantized = {name for parameter in loaders.sinks for name in loaders.stored_names(parameter)}
    modules: Mapping[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in quantized and isinstance(tensor, Tensor):
            path, _, attribute = name.rpartition(".")
            own = dtype_of(name, tensor.dtype)
            if not tensor.dtype.is_floating_point:
                loaders.whole_numbers.add(name)
            loader = DirectWeightLoader(modules[path], attribute, name, own, storage, loaders.non_finite)
            loaders.add(name, tensor, loader, Landing(None, loader.rows, loader.columns), [name])
    return loaders


def _looking(found: NonFiniteValues, assignment: Assignment, dtype: torch.dtype, on_finished: OnFinished) -> OnFinished:
    """`on_finished`, behind a look at layers with a weight so large that a code may be infinite in float16."""
    if dtype != torch.float16:
        return on_finished
    scheme, layer = assignment.scheme, weakref.ref(assignment.module)
    assert scheme is not None

    def finished(name: str, statistics: Tensor | None, process: Process) -> None:
        if statistics is not None and may_overflow(statistics):
            module: Any = alive(layer)
            for key, layout in scheme.layouts(module).items():
                tensors = tuple(tensor.detach() for tensor in scheme.weight(module, layout, key))
                look_at_codes(found, f"{name}.{key}", layout, tensors, scheme.kernels.dequantize, dtype)
        on_finished(name, statistics, process)

    return finished


def _attach_quantized(
    loaders: WeightLoaders,
    assignment: Assignment,
    storage: FinalStorage,
    input_scales: InputScales,
    on_finished: OnFinished,
) -> None:
    module: Any = assignment.module
    if assignment.stored is not None:
        _attach_stored(loaders, assignment, assignment.stored, storage, input_scales, on_finished)
        return
    if isinstance(module, CodedModule):
        _attach_linear(loaders, assignment, module, storage, on_finished)
        return
    finished = functools.partial(on_finished, assignment.name)
    loader = MoeOnlineWeightLoader(module, module.scheme, name=assignment.name, storage=storage, on_finished=finished)
    for name, layout in module.weight_layouts.items():
        full_name = f"{assignment.name}.{name}"
        landing = Landing(layout.experts, layout.rows, layout.columns, module.is_transposed, layout)
        stored = layout.format.names(full_name)
        loaders.add(full_name, module._parameters[name], loader.bound(name), landing, stored)


def _attach_linear(
    loaders: WeightLoaders,
    assignment: Assignment,
    module: CodedModule,
    storage: FinalStorage,
    on_finished: OnFinished,
) -> None:
    scheme: LinearScheme = module.scheme
    layer, name = weakref.ref(module), assignment.name  # the closure must not keep its own layer alive

    def finish(statistics: Tensor) -> None:
        on_finished(name, statistics, lambda: scheme.process_weights_after_loading(alive(layer)))

    for attribute, layout in scheme.layouts(module).items():
        full_name = f"{name}.{attribute}"
        parameter = materialized_in(module, attribute, full_name, layout, storage)
        loader = OnlineWeightLoader(attribute, linear_quantizer(scheme, LayerProgress({attribute: parameter}, finish)))
        param = module._parameters[attribute]
        assert param is not None
        landing = Landing(None, layout.rows, layout.columns, module.transposed, layout)
        loaders.add(full_name, param, loader, landing, layout.format.names(full_name))
        if layout.format.one_maximum:
            loaders.add_one_maximum(name, parameter)


def _attach_stored(
    loaders: WeightLoaders,
    assignment: Assignment,
    stored: ModuleWeights,
    storage: FinalStorage,
    input_scales: InputScales,
    on_finished: OnFinished,
) -> None:
    module: Any = assignment.module
    scheme, layer, name = module.scheme, weakref.ref(module), assignment.name
    transposed = module.transposed if isinstance(module, CodedModule) else module.is_transposed

    def finish() -> None:
        on_finished(name, None, lambda: scheme.process_weights_after_loading(alive(layer)))

    parameters: list[StoredParameter] = []
    for key, layout in scheme.layouts(module).items():
        full_name = f"{name}.{key}"
        parameter = materialized_in(module, key, full_name, layout, storage)
        weights = stored.weights[full_name]
        first = weights[0]
        closures = StoredParameter(parameter, stored.has_zero_points(full_name), first.zero_point, first.largest_scale)
        landing = Landing(layout.experts, layout.rows, layout.columns, transposed, layout)
        names = layout.format.names(full_name)
        loaders.add_as_is(full_name, module._parameters[key], closures.loaders, landing, names)
        for scale in layout.format.scales:
            module._parameters[key + scale.suffix].weight_loader = closures.loaders[scale_role(scale)]
        scale_key = scheme.input_scale_name(key)
        if scale_key in module._parameters:
            write = functools.partial(_write_input_scale, layer, scale_key, storage)
            loader = InputScaleLoader(parameter, f"{name}.{scale_key}", len(weights), input_scales, write)
            closures.loaders["input_scale"] = module._parameters[scale_key].weight_loader = loader
            names.append(f"{name}.{scale_key}")
        parameters.append(closures)
    StoredProgress(parameters, finish)


def _write_input_scale(layer: weakref.ref[Any], key: str, storage: FinalStorage, value: Tensor) -> None:
    plain(materialize(alive(layer), key, storage)).data.copy_(value)
