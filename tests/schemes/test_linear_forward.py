"""A linear layer of several shards computes what its shards compute alone."""

from __future__ import annotations

import pytest
import torch
from quantload.geometry.regions import Region
from quantload.online.parameter import materialized_in
from quantload.online.quantizing import LayerProgress, linear_quantizer
from quantload.online.storage import FinalStorage
from quantload.online.weight_loader import OnlineWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.base import LinearScheme
from quantload.schemes.registry import ENTRIES, SchemeFactory
from torch import Tensor, nn

CPU = torch.device("cpu")
SHARDS = (("q", 40), ("k", 16), ("v", 17))
COLUMNS = 96


def made_of(scheme: LinearScheme, *shards: tuple[str, Tensor]) -> nn.Module:
    """A layer whose weight is these shards, loaded through its closure."""
    layer = nn.Module()
    scheme.create_weights(layer, shards=tuple((name, len(weight)) for name, weight in shards), in_features=COLUMNS)
    (layout,) = scheme.layouts(layer).values()
    parameter = materialized_in(layer, "weight", "weight", layout, FinalStorage(CPU))
    quantizer = linear_quantizer(scheme, LayerProgress({"weight": parameter}, lambda _: None))
    loader = OnlineWeightLoader("weight", quantizer)
    if scheme.kernels.format.one_maximum:  # else a shard that arrives whole has all there is to know
        for name, weight in shards:
            loader.observe(weight, whole(layout.shard_rows(name)))
    for name, weight in shards:
        loader.load_region(weight, whole(layout.shard_rows(name)))
    return layer


def whole(rows: tuple[int, int]) -> Region:
    return Region(None, rows, (0, COLUMNS))


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES if entry.linear is not None])
def test_several_shards_compute_what_each_computes_alone(name: str) -> None:
    scheme = SchemeFactory(CPU, LoadOptions()).linear(name)
    assert scheme is not None
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, COLUMNS, generator=generator).to(torch.bfloat16) for _, rows in SHARDS]
    if scheme.kernels.format.one_maximum:
        for weight in weights:
            weight[0, 0] = 8.0  # the maximum of each is that of all
    x = torch.randn(3, 2, COLUMNS, generator=generator).to(torch.bfloat16)
    bias = torch.randn(sum(rows for _, rows in SHARDS), generator=generator)
    fused = made_of(scheme, *((shard, weight) for (shard, _), weight in zip(SHARDS, weights, strict=True)))
    alone = [made_of(scheme, ("", weight)) for weight in weights]
    biases = bias.split([rows for _, rows in SHARDS])

    assert torch.equal(
        scheme.dequantize(fused, "weight"), torch.cat([scheme.dequantize(layer, "weight") for layer in alone])
    )
    for given in (None, bias):
        each = [
            scheme.apply(layer, x, None if given is None else own) for layer, own in zip(alone, biases, strict=True)
        ]
        torch.testing.assert_close(scheme.apply(fused, x, given), torch.cat(each, dim=-1), rtol=1e-2, atol=1e-2)
