"""Engines build and load a model under a default dtype of their own: no byte depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from quantload.geometry.regions import Region
from quantload.kernels.formats import Tensors
from quantload.online.parameter import held_by
from quantload.online.quantizing import LayerProgress, linear_quantizer
from quantload.online.weight_loader import OnlineWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn

CPU = torch.device("cpu")


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["fp8_per_tensor", "nvfp4"])
def test_codes_and_scales_of_two_passes_are_those_of_float32(name: str, request: pytest.FixtureRequest) -> None:
    weight = torch.randn(48, 160, dtype=torch.float32)
    expected = observed_and_loaded(name, weight)
    request.getfixturevalue("bfloat16_by_default")
    found = observed_and_loaded(name, weight)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def observed_and_loaded(name: str, weight: Tensor) -> Tensors:
    """Codes and scales, which two passes made."""
    scheme = SchemeFactory(CPU, LoadOptions()).linear(name)
    assert scheme is not None
    layer = nn.Module()
    scheme.create_weights(layer, shards=(("", len(weight)),), in_features=weight.shape[1])
    (layout,) = scheme.layouts(layer).values()
    for key, (dtype, shape) in zip(layout.format.names("weight"), layout.tensors, strict=True):
        layer._parameters[key] = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    progress = LayerProgress({"weight": held_by(layer, "weight", "weight", layout, CPU)}, lambda _: None)
    loader = OnlineWeightLoader("weight", linear_quantizer(scheme, progress))
    whole = Region(None, (0, len(weight)), (0, weight.shape[1]))
    loader.observe(weight, whole)
    loader.load_region(weight, whole)
    return scheme.weight(layer, layout, "weight")
