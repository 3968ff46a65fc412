"""Layers of which a part is written anew, where a kernel wants codes and scales elsewhere than canonical ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from quantload.kernels.arrangement import Arrangement
from quantload.kernels.statistics import COUNT, STATS
from quantload.model.skeleton import Assignment
from quantload.reload.layers import OpenLayers
from torch import Tensor, nn


def reversed_in_place(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.flip(-1))


class Turned:
    """A scheme whose kernel wants everything the other way round."""

    def __init__(self) -> None:
        self.tensors = torch.arange(6).reshape(2, 3), torch.arange(2).reshape(1, 2)
        reversed_in_place(self.tensors)

    def arrangement(self, _: nn.Module) -> Arrangement:
        return Arrangement((1, 1), reversed_in_place, lambda tensors: tuple(each.flip(-1) for each in tensors))

    def layouts(self, _: nn.Module) -> dict[str, Any]:
        return {"weight": SimpleNamespace(numel=6)}

    def weight(self, *_: Any) -> tuple[Tensor, ...]:
        return self.tensors

    def canonical(self, module: nn.Module, _: str) -> tuple[Tensor, ...]:
        return self.arrangement(module).canonical(self.tensors)

    def process_weights_after_loading(self, _: nn.Module) -> None:
        reversed_in_place(self.tensors)


def statistics(count: int) -> Tensor:
    values = torch.zeros(STATS, dtype=torch.float64)
    values[COUNT] = count
    return values


def opened(keeps: bool) -> tuple[OpenLayers, Turned, list[Any]]:
    scheme: Any = Turned()
    told: list[Any] = []
    layers = OpenLayers(lambda name, found, process: (told.append((name, found is None)), process())[0], keeps)  # type: ignore[func-returns-value]
    layers.expect([Assignment("layer", "linear", nn.Module(), scheme, "")])
    return layers, scheme, told


def test_what_stays_is_where_pieces_are_written_and_goes_back() -> None:
    layers, scheme, told = opened(keeps=True)
    layers.touch("other.weight")
    layers.touch("layer.weight")
    assert scheme.tensors[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    layers.touch("layer.weight")  # no second time
    scheme.tensors[0][0] = torch.tensor([7, 8, 9])
    assert layers.touched == {"layer"}
    layers.close()
    assert scheme.tensors[0].tolist() == [[9, 8, 7], [5, 4, 3]]
    assert scheme.tensors[1].tolist() == [[1, 0]]
    assert told == []


def test_a_layer_that_is_written_again_after_it_was_complete() -> None:
    layers, scheme, told = opened(keeps=False)
    layers.touch("layer.weight")
    assert scheme.tensors[0].tolist() == [[2, 1, 0], [5, 4, 3]]  # all of it will be written
    scheme.tensors[0].copy_(torch.arange(6).reshape(2, 3))
    layers.on_layer("layer", statistics(6), lambda: scheme.process_weights_after_loading(nn.Module()))
    assert scheme.tensors[0].tolist() == [[2, 1, 0], [5, 4, 3]]
    layers.touch("layer.weight")
    assert scheme.tensors[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    layers.on_layer("layer", statistics(3), lambda: scheme.process_weights_after_loading(nn.Module()))
    assert scheme.tensors[0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert told == [("layer", False), ("layer", True)]  # statistics of a half are none
