"""Closures on layers of engines, against loaders that narrow, merge and map experts as those of engines do."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.checkpoint import FileSource, read_index
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.small_tensors import SmallTensors
from quantload.engines.arrivals import Arrivals
from quantload.engines.closures import (
    EngineLayer,
    EngineParameter,
    check_complete,
    engine_layers,
    quantized_experts,
    quantized_linear,
)
from quantload.engines.engine_load import stored_weights
from quantload.engines.experts_host import EngineExperts
from quantload.engines.lazy import LazyTensor
from quantload.engines.origin import CheckpointOrigin
from quantload.engines.placing import Placements, Shadow
from quantload.engines.stored_layers import StoredLayers, together
from quantload.errors import MissingWeightsError, RouteError, UnsupportedCheckpointError
from quantload.model.stored_sources import ModuleWeights
from quantload.online.storage import FinalStorage
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from quantload.schemes.stored.read import read_stored
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
Read = Callable[[dict[str, Tensor]], Iterator[tuple[str, Tensor]]]


class MergedLinear(nn.Module):
    """q, k and v as one, cut by rows among ranks, as engines do it."""

    sizes: ClassVar = {"q": 64, "k": 32, "v": 32}
    weight: Any
    weight_scale: Any

    def __init__(self, scheme: str, rank: int, ranks: int, stored: ModuleWeights | None = None) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.calls = 0
        factory = SchemeFactory(CPU, LoadOptions())
        kept = None if stored is None else factory.prequantized_linear("attn.qkv", stored.format.name, None)
        found: Any = kept or factory.linear(scheme)
        shards = tuple((name, rows // ranks) for name, rows in self.sizes.items())
        self.state = quantized_linear(
            self,
            "attn.qkv",
            found,
            shards,
            96,
            FinalStorage(CPU),
            self.weight_loader,
            torch.bfloat16,
            {"output_dim": 0},
            stored=stored,
        )

    def weight_loader(self, param: Any, loaded_weight: Tensor, loaded_shard_id: str) -> None:
        self.calls += 1
        data, dim = param.data, param.output_dim
        offsets = dict(zip(self.sizes, (0, 64 // self.ranks, 96 // self.ranks), strict=True))
        size = self.sizes[loaded_shard_id] // self.ranks
        part = loaded_weight.narrow(dim, self.rank * size, size)
        data.narrow(dim, offsets[loaded_shard_id], size).copy_(part)

    def rows(self, weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([weights[name].chunk(self.ranks)[self.rank] for name in self.sizes])


class Experts(nn.Module):
    """Experts of which a rank has every second one, with all of their columns or half of them."""

    hidden, intermediate, experts = 64, 96, 6
    w13_weight: Any
    w2_weight: Any

    def __init__(self, scheme: str, own: Sequence[int], stored: ModuleWeights | None = None) -> None:
        super().__init__()
        self.own = list(own)
        self.calls = 0
        factory = SchemeFactory(CPU, LoadOptions())
        kept = None if stored is None else factory.prequantized_experts("mlp.experts", stored.format.name, None)
        found: Any = kept or factory.experts(scheme)
        up = (("w1", self.intermediate), ("w3", self.intermediate))
        self.state = quantized_experts(
            self,
            "mlp.experts",
            found,
            len(self.own),
            {"w13_weight": (up, self.hidden), "w2_weight": ((("w2", self.hidden),), self.intermediate)},
            EngineExperts(),
            FinalStorage(CPU),
            self.weight_loader,
            torch.bfloat16,
            self.local,
            stored=stored,
        )

    def local(self, expert: int) -> int:
        return self.own.index(expert) if expert in self.own else -1

    def weight_loader(
        self, param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool
    ) -> bool:
        self.calls += 1
        local = self.local(expert_id)
        if local < 0:
            return False
        data = param.data[local]
        if shard_id != "w2":
            data = data.narrow(0, 0 if shard_id == "w1" else self.intermediate, self.intermediate)
        data.copy_(loaded_weight)
        return True


def weights_of(seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shape), generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def in_memory(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from weights.items()


@pytest.fixture
def from_file(tmp_path: Path) -> Read:
    def read(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        checkpoint = resolve(folder)
        source = FileSource(checkpoint.root)
        with CheckpointOrigin(read_index(checkpoint), source, LoadOptions(chunk_bytes=4096), CPU) as origin:
            yield from origin.tensors()

    return read


QKV = {name: (rows, 96) for name, rows in MergedLinear.sizes.items()}
EXPERTS = {
    f"{expert}.{shard}": (64, 96) if shard == "w2" else (96, 64)
    for expert in range(Experts.experts)
    for shard in ("w1", "w2", "w3")
}


def load_linear(layer: MergedLinear, tensors: Iterator[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        layer.weight.weight_loader(layer.weight, tensor, name)


def load_experts(layer: Experts, tensors: Iterator[tuple[str, Tensor]]) -> list[bool]:
    answers = []
    for name, tensor in tensors:
        expert, shard = name.split(".")
        param: Any = layer.w2_weight if shard == "w2" else layer.w13_weight
        answers.append(
            param.weight_loader(
                param=param, loaded_weight=tensor, weight_name="experts.weight", shard_id=shard,
                expert_id=int(expert), return_success=True,
            )
        )  # fmt: skip
    return answers


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_merged_layer_of_a_rank_has_the_bytes_of_its_rows(scheme: str, rank: int, from_file: Read) -> None:
    weights = weights_of(0, QKV)
    whole, lazy, arrived = MergedLinear(scheme, 0, 1), MergedLinear(scheme, rank, 2), MergedLinear(scheme, rank, 2)
    load_linear(lazy, from_file(weights))
    load_linear(arrived, in_memory(dict(reversed(weights.items()))))
    for layer in (lazy, arrived):
        layer.state.check_complete(may_be_made_up=False)
        expected = layer.rows(weights).float()
        found = layer.state.scheme.dequantize(layer, "weight")
        assert (found - expected).norm() < 0.2 * expected.norm()
    assert torch.equal(lazy.weight.data, arrived.weight.data)
    assert lazy.state.bytes_in == sum(each.nbytes for each in weights.values()) // 2
    load_linear(whole, from_file(weights))
    if scheme == "quark_mxfp4":  # whose scales know nothing of other rows
        rows = {"q": (0, 64), "k": (64, 96), "v": (96, 128)}
        codes = [whole.weight.data[low:high].chunk(2)[rank] for low, high in rows.values()]
        assert torch.equal(lazy.weight.data, torch.cat(codes))


def test_experts_are_worked_out_once_for_all_of_a_shape_and_shard(from_file: Read) -> None:
    weights = weights_of(1, EXPERTS)
    layer = Experts("quark_mxfp4", own=(1, 3, 5))
    answers = load_experts(layer, from_file(weights))
    layer.state.check_complete(may_be_made_up=False)
    assert answers == [int(name.split(".")[0]) in (1, 3, 5) for name in sorted(weights)]
    assert layer.calls == 2 * 3  # each shard of an expert that is here, and of one that is not
    up = layer.state.scheme.dequantize(layer, "w13_weight")
    for local, expert in enumerate((1, 3, 5)):
        expected = torch.cat([weights[f"{expert}.w1"], weights[f"{expert}.w3"]]).float()
        assert (up[local] - expected).norm() < 0.2 * expected.norm()


class Counter(TorchDispatchMode):
    """Counts elements that are copied, as vLLM does before a reload."""

    numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_a_reload_begins_with_counting_and_must_be_whole(from_file: Read) -> None:
    layer = MergedLinear("quark_mxfp4", 0, 1)
    load_linear(layer, from_file(weights_of(0, QKV)))
    before = layer.weight.data.clone()
    other = weights_of(7, QKV)

    def counted(weights: dict[str, Tensor]) -> int:
        held: Any = layer.weight
        meta = held.data.to("meta")
        meta.__class__, meta.__dict__ = held.__class__, held.__dict__.copy()
        counter = Counter()  # type: ignore[no-untyped-call]
        with counter:
            for name, tensor in weights.items():
                meta.weight_loader(meta, tensor, name)
        return counter.numel

    assert counted(other) == 128 * 96
    load_linear(layer, from_file(other))
    layer.state.check_complete(may_be_made_up=False)
    assert not torch.equal(layer.weight.data, before)

    part = {"k": other["k"]}
    assert counted(part) == 32 * 96
    load_linear(layer, from_file(part))
    with pytest.raises(MissingWeightsError, match=r"attn\.qkv\.weight rows 0:64.*loaded, and reloaded, whole"):
        layer.state.check_complete(may_be_made_up=True)


def test_a_layer_that_nothing_came_for_is_right_only_where_weights_are_made_up() -> None:
    layer = MergedLinear("quark_mxfp4", 0, 1)
    layer.state.check_complete(may_be_made_up=True)
    with pytest.raises(MissingWeightsError, match=r"attn\.qkv"):
        layer.state.check_complete(may_be_made_up=False)
    with pytest.raises(MissingWeightsError, match=r"attn\.qkv"):
        check_complete(state for _, state in engine_layers(nn.ModuleList([layer])))


def test_scales_take_nothing_from_a_checkpoint() -> None:
    scale: Any = MergedLinear("quark_mxfp4", 0, 1).weight_scale
    assert (scale.weight_loader_numel, next(iter(inspect.signature(scale.weight_loader).parameters))) == (0, "param")
    with pytest.raises(RouteError, match=r"attn\.qkv\.weight_scale.*quantized already"):
        scale.weight_loader(scale, torch.ones(1))


def test_a_loader_that_a_model_puts_in_the_place_of_ours_says_where_tensors_go() -> None:
    layer, weights = MergedLinear("quark_mxfp4", 0, 1), weights_of(3, QKV)
    param: Any = layer.weight

    def upside_down(param: Any, loaded_weight: Tensor) -> None:
        low = 0
        for part in reversed(loaded_weight.split((64, 32, 32))):
            param.data[low : low + len(part)] = part
            low += len(part)

    del param.weight_loader
    assert not hasattr(param, "weight_loader")
    param.weight_loader = upside_down
    param.weight_loader(param, torch.cat([weights["v"], weights["k"], weights["q"]][::-1]))
    layer.state.check_complete(may_be_made_up=False)
    found = layer.state.scheme.dequantize(layer, "weight")
    expected = torch.cat([weights["v"], weights["k"], weights["q"]]).float()
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_values_that_are_copied_to_a_whole_parameter_are_quantized(from_file: Read) -> None:
    copied, called = Experts("quark_mxfp4", own=range(6)), Experts("quark_mxfp4", own=range(6))
    weights = weights_of(1, EXPERTS)
    load_experts(called, in_memory(weights))
    for name, shards in {"w13_weight": ("w1", "w3"), "w2_weight": ("w2",)}.items():
        param: Any = getattr(copied, name)
        stacked = torch.stack([torch.cat([weights[f"{expert}.{shard}"] for shard in shards]) for expert in range(6)])
        ((_, tensor),) = from_file({"weight": stacked.transpose(1, 2).contiguous()})
        param.copy_(tensor.permute(0, 2, 1).contiguous())
    copied.state.check_complete(may_be_made_up=False)
    assert torch.equal(copied.w13_weight.data, called.w13_weight.data)
    assert torch.equal(copied.w2_weight.data, called.w2_weight.data)
    other: Any = Experts("quark_mxfp4", own=range(6)).w2_weight
    other.copy_(copied.w2_weight.data)
    assert torch.equal(other.data, copied.w2_weight.data)


def test_what_an_engine_wraps_around_a_closure_stays_there() -> None:
    param: Any = MergedLinear("quark_mxfp4", 0, 1).weight
    own = param.weight_loader

    @functools.wraps(own)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return own(*arguments, **named)

    param.weight_loader = wrapped
    assert param.weight_loader is wrapped
    param.weight_loader = own
    assert param.weight_loader is own
    assert isinstance(param, EngineParameter)
    assert own.__name__ == "quantload_weight_loader"


def test_a_layer_can_go_while_its_parameters_are_held() -> None:
    layer = MergedLinear("quark_mxfp4", 0, 1)
    param: Any = layer.weight
    weights = weights_of(0, QKV)
    del layer
    import gc

    gc.collect()
    with pytest.raises(ReferenceError, match="was deleted while it was being loaded"):
        param.weight_loader(param, weights["q"], "q")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_places_are_where_a_loader_copies_to(data: st.DataObject) -> None:
    """A loader of narrow, transpose, chunk and step is run on numbers and on a shadow: the same elements change."""
    experts = data.draw(st.sampled_from([None, 3]), "experts")
    rows, columns = data.draw(st.integers(1, 6), "rows"), data.draw(st.integers(1, 6), "columns")
    shape = (rows, columns) if experts is None else (experts, rows, columns)
    low = data.draw(st.integers(0, rows - 1), "low")
    height = data.draw(st.integers(1, rows - low), "height")
    left = data.draw(st.integers(0, columns - 1), "left")
    width = data.draw(st.integers(1, columns - left), "width")
    transposed = data.draw(st.booleans(), "transposed")
    step = data.draw(st.sampled_from([1, 2]), "step")
    skipped = data.draw(st.integers(0, 3), "skipped")

    def loader(param: Any, tensor: Tensor) -> str:
        tensor = tensor[..., skipped:]
        source = tensor.transpose(-1, -2) if transposed else tensor
        target = param.data[..., low : low + height : step, left : left + width]
        target.copy_(source)
        return "done"

    taken = len(range(low, low + height, step))
    matrix_shape = (width, taken + skipped) if transposed else (taken, width + skipped)
    source_shape = matrix_shape if experts is None else (experts, *matrix_shape)
    numbers = torch.arange(1.0, 1 + torch.Size(source_shape).numel()).reshape(source_shape)
    expected = torch.zeros(shape)
    holder: Any = nn.Parameter(expected)
    loader(holder, numbers)

    borders = sorted({0, rows // 2, rows})
    placements = Placements(loader, Shadow(shape, torch.float32, borders))
    lazy = Arrivals().wrap(numbers)
    for _ in range(2):  # the second time from what is known
        placed = placements.of(lazy, (), {})
        assert placed.result == "done"
        found = torch.zeros(shape)
        for _, region, offset, row_stride, column_stride in (place for _, places in placed.places for place in places):
            assert sum(region.rows[0] < border < region.rows[1] for border in borders) == 0
            extent = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
            matrix = found if region.expert is None else found[region.expert]
            part = numbers.as_strided(extent, (row_stride, column_stride), offset)
            matrix[slice(*region.rows), slice(*region.columns)] = part
        assert torch.equal(found, holder.data)
        assert placed.numel == int((holder.data != 0).sum())


def test_a_loader_that_computes_is_asked_about_each_tensor() -> None:
    def loader(param: Any, tensor: Tensor) -> None:
        param.data.copy_(tensor * 2)

    placements = Placements(loader, Shadow((2, 3), torch.float32, (0, 2)))
    for factor in (1.0, 3.0):
        placed = placements.of(Arrivals().wrap(torch.full((2, 3), factor)), (), {})
        ((origin, (place,)),) = placed.places
        assert place.region.rows == (0, 2)
        read = LazyTensor.of_source(origin, 0, (2, 3), torch.float32, Arrivals().wrap)
        assert torch.equal(origin.read(read, "test"), torch.full((2, 3), 2 * factor))


def test_a_copy_that_is_no_rectangle_is_refused() -> None:
    def loader(param: Any, tensor: Tensor) -> None:
        param.data[:, ::2].copy_(tensor)

    placements = Placements(loader, Shadow((2, 4), torch.float32, (0, 2)))
    with pytest.raises(RouteError, match="no rectangle of rows and columns"):
        placements.of(Arrivals().wrap(torch.ones(2, 2)), (), {})


def test_layers_are_told_of_once_they_are_complete() -> None:
    layer, told = Experts("quark_mxfp4", own=range(6)), list[str]()
    state: EngineLayer = layer.state
    state.on_finished = lambda name, statistics, process: told.append(name)
    load_experts(layer, in_memory(weights_of(1, EXPERTS)))
    assert told == ["mlp.experts"]


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def stored_in_fp8(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A checkpoint of codes with a scale for each tensor; the values that they stand for."""
    stored, values = dict[str, Tensor](), dict[str, Tensor]()
    for number, (name, weight) in enumerate(weights.items()):
        codes, scale = weight.to(torch.float8_e4m3fn), torch.tensor(0.25 * (1 + number % 3))
        stored |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        values[name] = codes.float() * scale
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": FP8}))
    return values


def tensors_of(folder: Path, immediate: bool = False) -> Iterator[tuple[str, LazyTensor]]:
    """The values that a quantized checkpoint stands for, not read yet, by the names of its weights."""
    checkpoint, factory = resolve(folder), SchemeFactory(CPU, LoadOptions())
    index = read_index(checkpoint)
    with SmallTensors(checkpoint, index) as read:
        stored = read_stored(checkpoint.config(), index.tensors, read)
    source = FileSource(checkpoint.root)
    with CheckpointOrigin(
        index,
        source,
        LoadOptions(chunk_bytes=4096),
        CPU,
        stored=stored,
        dequantizer=factory.dequantizer,
        immediate=immediate,
    ) as origin:
        for name, tensor in origin.tensors():
            yield name.removesuffix(".weight"), tensor
        origin.flush()


def kinds(folder: Path) -> StoredLayers:
    weights = stored_weights(str(folder))
    assert weights is not None
    return StoredLayers(weights, lambda name: f"layer.{name}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_merged_layer_stays_as_its_parts_are_stored(rank: int, tmp_path: Path) -> None:
    """Each part with a scale of its own; a second time after a reload was announced."""
    values = stored_in_fp8(weights_of(0, QKV), tmp_path)
    stored = together(kinds(tmp_path).linear([f"layer.{name}" for name in QKV]))
    layer = MergedLinear("", rank, 2, stored)
    for _ in range(2):
        load_linear(layer, tensors_of(tmp_path))
        layer.state.check_complete(may_be_made_up=False)
        assert torch.equal(layer.state.scheme.dequantize(layer, "weight"), layer.rows(values))
        layer.state.reset()
        layer.weight.data.zero_()
    with pytest.raises(MissingWeightsError, match=r"attn\.qkv\.weight rows 0:64"):
        layer.state.check_complete(may_be_made_up=False)


def test_experts_stay_as_they_are_stored(tmp_path: Path) -> None:
    values = stored_in_fp8(weights_of(1, EXPERTS), tmp_path)
    layer = Experts("", own=(1, 3, 5), stored=kinds(tmp_path).experts("layer"))
    load_experts(layer, tensors_of(tmp_path, immediate=True))
    layer.state.check_complete(may_be_made_up=False)
    up, down = (layer.state.scheme.dequantize(layer, name) for name in ("w13_weight", "w2_weight"))
    for local, expert in enumerate((1, 3, 5)):
        assert torch.equal(up[local], torch.cat([values[f"{expert}.w1"], values[f"{expert}.w3"]]))
        assert torch.equal(down[local], values[f"{expert}.w2"])


def test_what_stays_as_stored_takes_nothing_else(tmp_path: Path, from_file: Read) -> None:
    stored_in_fp8(weights_of(0, QKV), tmp_path)
    layer = MergedLinear("", 0, 1, together(kinds(tmp_path).linear([f"layer.{name}" for name in QKV])))
    with pytest.raises(RouteError, match=r"attn\.qkv\.weight stays as its checkpoint stores it"):
        load_linear(layer, in_memory(weights_of(0, QKV)))
    with pytest.raises(UnsupportedCheckpointError, match=r"attn\.qkv\.weight is in fp8_tensor, .* is torch\.bfloat16"):
        load_linear(layer, from_file(weights_of(0, QKV)))


def test_a_part_that_is_not_quantized_keeps_the_whole_from_staying_as_stored(tmp_path: Path) -> None:
    stored_in_fp8({"q": weights_of(0, QKV)["q"]}, tmp_path)
    found = kinds(tmp_path).linear(["layer.q", "layer.k"])
    assert found[0] is not None
    assert found[1] is None
    assert together(found) is None
    assert kinds(tmp_path).experts("other") is None
