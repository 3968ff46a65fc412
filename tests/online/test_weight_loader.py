"""The closures as vLLM and SGLang call them: whole shards by shard_id, in any order, again after `reset`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantload.errors import NonFiniteWeightError, RepeatedRegionError, ShapeMismatchError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.kernels import statistics
from quantload.online.parameter import materialize, materialized_in
from quantload.online.quantizing import LayerProgress, linear_quantizer
from quantload.online.storage import FinalStorage
from quantload.online.weight_loader import DirectWeightLoader, OnlineWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.base import meta_parameter
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn

CPU = torch.device("cpu")
Q, K, V = 24, 8, 8
COLUMNS = 64
SCHEMES = [
    "quark_mxfp4",
    "mxfp6_e2m3",
    "mxfp8",
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "int8_per_channel",
    "int4_per_group",
    "quark_int4fp8_moe",
]


class Linear(nn.Module):
    """A quantized weight, which has a closure."""

    weight: Any
    weight_scale: Tensor


class Fused:
    """A fused q, k, v layer with a closure on its weight, and what it said when it was finished."""

    def __init__(self, scheme_name: str = "int8_per_channel", shards: bool = True) -> None:
        scheme = SchemeFactory(CPU, LoadOptions()).linear(scheme_name)
        assert scheme is not None
        self.scheme = scheme
        parts = (("q", Q), ("k", K), ("v", V)) if shards else (("", Q + K + V),)
        self.layout = WeightLayout(self.scheme.kernels.format, None, parts, COLUMNS)
        self.layer = Linear()
        self.layer.register_parameter("weight", meta_parameter(self.layout.shapes[0], self.layout.format.code_dtype))
        scale = meta_parameter(self.layout.shapes[1], self.layout.format.scale_dtype)
        self.layer.register_parameter("weight_scale", scale)
        self.finished: list[Tensor] = []
        parameter = materialized_in(self.layer, "weight", "attn.qkv.weight", self.layout, FinalStorage(CPU))
        self.progress = LayerProgress({"weight": parameter}, self.finished.append)
        self.loader = OnlineWeightLoader("weight", linear_quantizer(self.scheme, self.progress))
        self.layer.weight.weight_loader = self.loader

    def load(self, weight: Tensor, **where: Any) -> None:
        """Call it as an engine does: look the closure up on the parameter that is there now."""
        param = self.layer.weight
        param.weight_loader(param, weight, **where)

    def codes(self) -> tuple[Tensor, Tensor]:
        return self.layer.weight.data, self.layer.weight_scale.data

    def expected(self, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of each shard quantized alone, one under the other."""
        codes, scales = [], []
        for weight in weights:
            fmt = self.layout.format
            codes.append(torch.empty(fmt.code_shape(*weight.shape), dtype=fmt.code_dtype))
            scales.append(torch.empty(fmt.scale_shape(*weight.shape), dtype=fmt.scale_dtype))
            assert self.scheme.kernels.quantize(weight, (codes[-1], scales[-1])) == 0
        return torch.cat([c.view(torch.uint8) for c in codes]), torch.cat(scales)

    def check(self, *weights: Tensor) -> None:
        codes, scales = self.codes()
        want_codes, want_scales = self.expected(*weights)
        assert torch.equal(codes.view(torch.uint8), want_codes)
        assert torch.equal(scales, want_scales)


def weight(rows: int, seed: int = 0, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ["qkv", "vqk"])
def test_whole_shards_by_id_in_any_order(scheme: str, order: str) -> None:
    fused = Fused(scheme)
    weights = {"q": weight(Q, 1), "k": weight(K, 2), "v": weight(V, 3)}
    for shard in order:
        assert not fused.finished
        fused.load(weights[shard], shard_id=shard)
    assert len(fused.finished) == 1
    fused.check(*weights.values())
    assert fused.finished[0][statistics.COUNT] == (Q + K + V) * COLUMNS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fused_checkpoint_tensor_is_cut_at_the_shard_borders(scheme: str) -> None:
    fused, whole = Fused(scheme), weight(Q + K + V)
    fused.load(whole)
    fused.check(*whole.split([Q, K, V]))


def test_an_expert_of_a_layer_that_has_none_is_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"attn\.qkv\.weight: got expert_id 0 .* no expert_id is expected"):
        Fused().load(weight(Q), shard_id="q", expert_id=0)


def test_an_unknown_shard_names_those_there_are() -> None:
    with pytest.raises(ShapeMismatchError, match=r"attn\.qkv\.weight: no shard 'w1'; there are 'q', 'k', 'v'"):
        Fused().load(weight(Q), shard_id="w1")


@pytest.mark.parametrize("shape", [(Q, COLUMNS - 1), (Q + 1, COLUMNS), (COLUMNS, Q), (Q * COLUMNS,)])
def test_a_shard_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    fused = Fused()
    with pytest.raises(ShapeMismatchError, match=rf"attn\.qkv\.weight: .*shape \({Q}, {COLUMNS}\)"):
        fused.load(torch.zeros(shape, dtype=torch.bfloat16), shard_id="q")
    fused.load(weight(Q), shard_id="q")  # it was not counted as arrived


def test_the_closure_moves_to_the_parameter_that_replaces_the_meta_one() -> None:
    fused = Fused()
    meta = fused.layer.weight
    assert meta.is_meta
    fused.load(weight(Q), shard_id="q")
    assert fused.layer.weight is not meta
    assert not fused.layer.weight.is_meta
    assert not fused.layer.weight.requires_grad
    assert fused.layer.weight.weight_loader is fused.loader


def test_a_repeat_is_an_error_until_a_reload_is_announced() -> None:
    fused = Fused()
    first, second = weight(Q + K + V, 1), weight(Q + K + V, 2)
    fused.load(first)
    where = fused.codes()[0].data_ptr()
    with pytest.raises(RepeatedRegionError, match="Announce a reload"):
        fused.load(second[:Q], shard_id="q")
    fused.check(*first.split([Q, K, V]))
    fused.layer.weight.weight_loader.reset()
    fused.load(second)
    assert fused.codes()[0].data_ptr() == where
    fused.check(*second.split([Q, K, V]))
    assert len(fused.finished) == 2
    assert fused.finished[1][statistics.COUNT] == (Q + K + V) * COLUMNS


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_block"])
def test_a_reload_of_one_region_leaves_the_rest_as_it_is(scheme: str) -> None:
    fused, whole, other = Fused(scheme), weight(Q + K + V, 1), weight(K, 2)
    fused.load(whole)
    shard = Region(None, (Q, Q + K), (0, COLUMNS))
    fused.loader.reset(shard)
    with pytest.raises(RepeatedRegionError):
        fused.load(whole[:Q], shard_id="q")
    assert list(fused.loader.missing()) == [f"attn.qkv.weight {shard}"]
    fused.load(other, shard_id="k")
    q, _, v = whole.split([Q, K, V])
    fused.check(q, other, v)
    assert len(fused.finished) == 2
    assert fused.finished[1][statistics.COUNT] == K * COLUMNS


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_channel"])
def test_a_reset_of_one_region_forgets_what_was_observed_of_its_matrix(scheme: str) -> None:
    fused, whole = Fused(scheme, shards=False), weight(Q + K + V)
    matrix = Region(None, (0, Q + K + V), (0, COLUMNS))
    halves = [(whole[:, left : left + 32], Region(None, matrix.rows, (left, left + 32))) for left in (0, 32)]
    fused.loader.observe(*halves[0])
    fused.loader.reset(matrix)
    for part, region in halves:
        with pytest.raises(ValueError, match="observe every piece first"):
            fused.load(part, region=region)
        fused.loader.observe(part, region)
    for part, region in halves:
        fused.load(part, region=region)
    fused.check(whole)


@pytest.mark.parametrize(
    ("scheme", "region"),
    [
        ("quark_mxfp4", Region(None, (0, Q), (0, 16))),
        ("fp8_per_channel", Region(None, (0, Q), (0, 32))),
        ("fp8_per_tensor", Region(None, (0, 4), (0, COLUMNS))),
        ("fp8_per_block", Region(None, (4, Q), (0, COLUMNS))),
    ],
)
def test_a_piece_that_cuts_scale_blocks_is_refused(scheme: str, region: Region) -> None:
    fused = Fused(scheme)
    part = weight(region.rows[1] - region.rows[0], columns=region.columns[1])
    with pytest.raises(ValueError, match="whole blocks, or observe every piece first"):
        fused.load(part, region=region)
    fused.load(weight(Q), shard_id="q")  # and nothing was claimed


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_block", "int8_per_channel"])
def test_two_passes_over_pieces_give_the_bytes_of_one(scheme: str) -> None:
    fused, whole = Fused(scheme, shards=False), weight(Q + K + V)
    regions = [Region(None, (low, low + 10), (left, left + 32)) for low in (0, 10, 20, 30) for left in (32, 0)]
    pieces = [(whole[slice(*r.rows), slice(*r.columns)], r) for r in regions]
    for piece, region in pieces:
        fused.loader.observe(piece, region)
    for piece, region in reversed(pieces):
        fused.load(piece, region=region)
    fused.check(whole)
    assert len(fused.finished) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ["qkv", "vqk"])
def test_shards_that_arrive_apart_are_observed_apart(scheme: str, order: str) -> None:
    fused, columns = Fused(scheme), (0, COLUMNS)
    weights = {"q": weight(Q, 1), "k": weight(K, 2), "v": weight(V, 3)}
    for shard in order:
        low, high = fused.layout.shard_rows(shard)
        regions = [Region(None, (row, row + 4), columns) for row in range(low, high, 4)]
        parts = weights[shard].split(4)
        for part, region in zip(parts, regions, strict=True):
            fused.loader.observe(part, region)
        for part, region in zip(parts, regions, strict=True):
            fused.loader.load_region(part, region)
    assert len(fused.finished) == 1
    fused.check(*weights.values())


def test_observing_again_after_a_reload_starts_from_nothing() -> None:
    """Where the maxima will stand are the scales of the load before, which are larger here than all that comes."""
    fused = Fused("fp8_per_tensor", shards=False)
    large, small = weight(Q + K + V) * 2.0**20, weight(Q + K + V)
    for whole in (large, small):
        fused.loader.reset()
        halves = [(whole[low : low + 20], Region(None, (low, low + 20), (0, COLUMNS))) for low in (0, 20)]
        for part, region in halves:
            fused.loader.observe(part, region)
        for part, region in halves:
            fused.load(part, region=region)
        fused.check(whole)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_place(scheme: str, value: float) -> None:
    fused, bad = Fused(scheme), weight(K)
    bad[5, 33] = value
    with pytest.raises(NonFiniteWeightError, match=r"attn\.qkv\.weight: element \[5, 33\]") as caught:
        fused.load(bad, shard_id="k")
    assert caught.value.position == (5, 33)


def test_a_nan_of_the_first_pass_is_named_too() -> None:
    fused, bad = Fused("fp8_per_tensor", shards=False), weight(20)
    bad[7, 1] = torch.nan
    with pytest.raises(NonFiniteWeightError) as caught:
        fused.loader.observe(bad, Region(None, (20, 40), (0, COLUMNS)))
    assert caught.value.position == (7, 1)


def test_the_layer_is_finished_by_its_last_parameter() -> None:
    factory: Any = SchemeFactory(CPU, LoadOptions()).linear("int8_per_channel")
    layer = nn.Module()
    finished: list[bool] = []
    layout = WeightLayout(factory.kernels.format, None, (("", 4),), COLUMNS)
    parameters = {}
    for name in ("a", "b"):
        layer.register_parameter(name, meta_parameter(layout.shapes[0], torch.int8))
        layer.register_parameter(f"{name}_scale", meta_parameter(layout.shapes[1], torch.float32))
        parameters[name] = materialized_in(layer, name, name, layout, FinalStorage(CPU))
    progress = LayerProgress(parameters, lambda _: finished.append(True))
    quantizer = linear_quantizer(factory, progress)
    for name in ("b", "a"):
        assert not finished
        OnlineWeightLoader(name, quantizer)(getattr(layer, name), weight(4))
    assert finished == [True]


# Parameters kept as stored


class Kept(nn.Module):
    p: Any

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_parameter("p", nn.Parameter(torch.empty(shape, device="meta")))

    def loader(self, dtype: torch.dtype = torch.bfloat16) -> DirectWeightLoader:
        loader = DirectWeightLoader(self, "p", "norm.p", dtype, FinalStorage(CPU))
        self.p.weight_loader = loader
        return loader


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_a_whole_tensor_is_kept_in_the_dtype_asked_for(shape: tuple[int, ...]) -> None:
    module, value = Kept(*shape), torch.randn(shape)
    module.loader(torch.bfloat16)(module.p, value)
    assert torch.equal(module.p, value.to(torch.bfloat16))
    assert module.p.weight_loader.tracker.complete


@pytest.mark.parametrize("got", [(4, 3), (12,), (3, 5), (1, 3, 4)])
def test_a_whole_tensor_of_another_shape_is_refused(got: tuple[int, ...]) -> None:
    module = Kept(3, 4)
    with pytest.raises(ShapeMismatchError, match=r"norm\.p: got a tensor of shape .* \(3, 4\)"):
        module.loader()(module.p, torch.zeros(got))
    assert not module.p.weight_loader.tracker.complete


@pytest.mark.parametrize("got", [(3, 2), (6,), (2, 4)])
def test_a_piece_of_another_shape_is_refused(got: tuple[int, ...]) -> None:
    module = Kept(3, 4)
    with pytest.raises(ShapeMismatchError, match=r"norm\.p: got a tensor of shape .* \(2, 3\)"):
        module.loader()(module.p, torch.zeros(got), region=Region(None, (0, 2), (1, 4)))


def test_parts_of_a_kept_tensor() -> None:
    module, value = Kept(2, 3, 4), torch.randn(2, 3, 4).to(torch.bfloat16)
    loader = module.loader()
    flat = value.view(6, 4)
    loader(module.p, flat[2:, :2], region=Region(None, (2, 6), (0, 2)))
    loader(module.p, flat[2:, 2:], region=Region(None, (2, 6), (2, 4)))
    assert not loader.tracker.complete
    loader(module.p, flat[:2], region=Region(None, (0, 2), (0, 4)))
    assert torch.equal(module.p, value)
    with pytest.raises(RepeatedRegionError):
        loader(module.p, value)
    loader.reset()
    loader(module.p, value + 1)
    assert torch.equal(module.p, value + 1)


def test_bytes_read_straight_into_place() -> None:
    module, value = Kept(4, 6), torch.randn(4, 6)
    loader = module.loader(torch.float32)
    region = Region(None, (1, 4), (0, 6))
    assert loader.in_place(torch.bfloat16, region) is None
    assert loader.in_place(torch.float32, Region(None, (1, 4), (0, 5))) is None
    assert loader.in_place(torch.float32, Region(None, (1, 2), (0, 5))) is not None
    place = loader.in_place(torch.float32, region)
    assert place is not None
    place.target().copy_(value[1:].reshape(-1).view(torch.uint8))
    place.arrived()
    assert torch.equal(module.p[1:], value[1:])
    assert [str(r) for r in loader.tracker.missing()] == ["rows 0:1, columns 0:6"]


class Counting(nn.Module):
    steps: Tensor


def test_a_buffer_comes_into_being_too() -> None:
    module = Counting()
    module.register_buffer("steps", torch.empty((3,), dtype=torch.int64, device="meta"))
    loader = DirectWeightLoader(module, "steps", "steps", torch.int64, FinalStorage(CPU))
    loader(module.steps, torch.tensor([1, 2, 3]))
    assert module.steps.tolist() == [1, 2, 3]
    assert "steps" in dict(module.named_buffers())


def test_materializing_twice_gives_the_same_tensor() -> None:
    module = Kept(3)
    first = materialize(module, "p", FinalStorage(CPU))
    assert materialize(module, "p", FinalStorage(CPU)) is first
    assert isinstance(first, nn.Parameter)
    assert first.requires_grad
