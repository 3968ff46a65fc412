"""Where the codes and scales of a parameter come from: made on arrival, or those that stand on the layer now."""

from __future__ import annotations

import torch
from quantload.geometry.layout import WeightLayout
from quantload.kernels.formats import FORMATS
from quantload.online.parameter import held_by, materialized_in
from quantload.online.storage import FinalStorage
from torch import nn

CPU = torch.device("cpu")
LAYOUT = WeightLayout(FORMATS["mxfp4"], None, (("", 32),), 64)


def layer(device: str) -> nn.Module:
    module = nn.Module()
    for name, tensor in zip(("weight", "weight_scale"), LAYOUT.format.empty(32, 64, torch.device(device)), strict=True):
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def test_a_meta_parameter_is_made_real_by_the_first_who_asks_and_stays() -> None:
    module = layer("meta")
    parameter = materialized_in(module, "weight", "a.weight", LAYOUT, FinalStorage(CPU))
    assert module._parameters["weight"].is_meta  # type: ignore[union-attr]
    codes, scales = parameter.tensors()
    assert (codes.shape, scales.shape) == tuple(map(torch.Size, LAYOUT.shapes))
    assert codes.data_ptr() == module._parameters["weight"].data_ptr()  # type: ignore[union-attr]
    assert parameter.tensors()[0] is codes


def test_what_a_layer_holds_is_looked_up_each_time() -> None:
    module = layer("cpu")
    parameter = held_by(module, "weight", "a.weight", LAYOUT, CPU)
    before = parameter.tensors()
    assert [each.data_ptr() for each in before] == [each.data_ptr() for each in module.parameters()]
    module._parameters.update(layer("cpu")._parameters)  # as vLLM does in a reload
    after = parameter.tensors()
    assert [each.data_ptr() for each in after] == [each.data_ptr() for each in module.parameters()]
    assert after[0].data_ptr() != before[0].data_ptr()
