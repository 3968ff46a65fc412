"""Quantized layers that are written to piece by piece while what does not come of them stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..geometry.regions import Region
from ..kernels.statistics import COUNT
from ..model.attach import OnFinished, Process
from ..model.skeleton import Assignment
from ..online.sink import Sink
from ..online.weight_loader import OnlineWeightLoader


class OpenLayers:
    """Brings layers to where pieces are written, and back to where their kernels want them.

    `on_layer` is told of those of which everything has come; without statistics where some of it came twice, so that
    they would be of a part only. `keeps`: what does not come is to stay as it is.
    """

    def __init__(self, on_layer: OnFinished, keeps: bool) -> None:
        self._on_layer, self._keeps = on_layer, keeps
        self._layers: Mapping[str, Assignment] = {}
        self._open: set[str] = set()
        self.finished: set[str] = set()

    def expect(self, assignments: Iterable[Assignment]) -> None:
        """The layers there are."""
        self._layers = {each.name: each for each in assignments if each.scheme is not None}

    @property
    def touched(self) -> set[str]:
        """Those that were written to."""
        return self._open | self.finished

    def touch(self, parameter: str) -> None:
        """Something is about to be written to a parameter."""
        name = parameter.rpartition(".")[0]
        if name in self._open or name not in self._layers:
            return
        if self._keeps or name in self.finished:
            _unarrange(self._layers[name])
        self._open.add(name)
        self.finished.discard(name)

    def on_layer(self, name: str, statistics: Tensor | None, process: Process) -> None:
        """Everything of a layer has come."""
        self._open.discard(name)
        self.finished.add(name)
        if statistics is not None and int(statistics[COUNT]) != _numel(self._layers[name]):
            statistics = None
        self._on_layer(name, statistics, process)

    def close(self) -> None:
        """Bring layers of which a part has come to where their kernels want them."""
        for name in self._open:
            layer = self._layers[name]
            assert layer.scheme is not None
            layer.scheme.process_weights_after_loading(layer.module)


def scales_reach_over_rows(sinks: Iterable[Sink]) -> bool:
    """Whether there are closures for which rows of a matrix do not decide their own scales."""
    return any(not _rows_are_local(sink) for sink in sinks if isinstance(sink, OnlineWeightLoader))


def _rows_are_local(sink: OnlineWeightLoader) -> bool:
    layout = sink.parameter.layout
    rows = min(layout.align[0], layout.shards[0][1])
    return sink.scales_are_local(Region(None if layout.experts is None else 0, (0, rows), (0, layout.columns)))


def _numel(layer: Assignment) -> int:
    assert layer.scheme is not None
    return sum(layout.numel for layout in layer.scheme.layouts(layer.module).values())


def _unarrange(layer: Assignment) -> None:
    """Bring the codes and scales of a layer to the canonical layout, in place."""
    scheme, module = layer.scheme, layer.module
    assert scheme is not None
    if scheme.arrangement(module) is None:
        return
    held: Any = module
    for name, layout in scheme.layouts(held).items():
        for tensor, canonical in zip(scheme.weight(held, layout, name), scheme.canonical(held, name), strict=True):
            tensor.copy_(canonical)
