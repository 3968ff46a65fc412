"""What lazy tensors are read into: an engine's tensors at once, closures that quantize with the rest of their layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload.checkpoint import FileSource, read_index
from quantload.checkpoint.resolve import resolve
from quantload.engines import origin as origins
from quantload.engines.arrivals import Arrivals
from quantload.engines.lazy import LazyTensor
from quantload.engines.origin import CheckpointOrigin, layer_of
from quantload.errors import MissingWeightsError, NonFiniteWeightError
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import Tensors
from quantload.model.boxes import region_of
from quantload.online.parameter import held_by
from quantload.online.quantizing import LayerProgress, linear_quantizer
from quantload.online.weight_loader import OnlineWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.registry import ENTRIES, SchemeFactory
from safetensors.torch import save_file
from torch import Tensor, nn

CPU = torch.device("cpu")
SHARDS = {"q": 64, "k": 32, "v": 32}
COLUMNS = 128
LINEAR = [entry.name for entry in ENTRIES if entry.linear is not None and entry.name != "none"]


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Two layers of q, k and v, in an order in which they do not belong together, and what is kept."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"model.layers.{layer}.{name}": torch.randn(rows, COLUMNS, generator=generator).to(torch.bfloat16) * (layer + 1)
        for layer in range(2)
        for name, rows in SHARDS.items()
    }
    found["model.norm"] = torch.arange(COLUMNS).to(torch.bfloat16)
    found["model.conv"] = torch.arange(4 * 2 * 6).to(torch.bfloat16).reshape(4, 2, 6)
    found["model.scalar"] = torch.tensor(3.0)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(weights(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def opened(folder: Path, **given: Any) -> CheckpointOrigin:
    checkpoint = resolve(folder)
    options = given.pop("options", LoadOptions(chunk_bytes=4096, workers=2))
    return CheckpointOrigin(read_index(checkpoint), FileSource(checkpoint.root), options, CPU, **given)


class Fused:
    """A layer that an engine made of q, k and v, and how its own loader would call the closure."""

    def __init__(self, scheme: str, name: str) -> None:
        found = SchemeFactory(CPU, LoadOptions()).linear(scheme)
        assert found is not None
        self.layer = nn.Module()
        found.create_weights(self.layer, shards=tuple(SHARDS.items()), in_features=COLUMNS)
        (self.layout,) = found.layouts(self.layer).values()
        for parameter, tensor in list(self.layer._parameters.items()):
            assert tensor is not None
            real = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU), requires_grad=False)
            self.layer._parameters[parameter] = real
        self.parameter = held_by(self.layer, "weight", f"{name}.qkv.weight", self.layout, CPU)
        self.finished: list[Tensor] = []
        progress = LayerProgress({"weight": self.parameter}, self.finished.append)
        self.loader = OnlineWeightLoader("weight", linear_quantizer(found, progress))

    def load(self, weight: LazyTensor, shard: str) -> None:
        low, _ = self.layout.shard_rows(shard)
        for box in weight.boxes:
            region = region_of(box)
            region = region._replace(rows=(region.rows[0] + low, region.rows[1] + low))
            span = Span(self.loader.name, region, box.offset, *box.strides)
            weight.origin.deliver(box.source, span, self.loader)

    def tensors(self) -> Tensors:
        return self.parameter.tensors()


def expected(scheme: str, layer: int) -> Tensors:
    """What one after the other gives, observed first."""
    fused = Fused(scheme, "expected")
    for load in (fused.loader.observe, fused.loader.load_region):
        for shard in SHARDS:
            low, high = fused.layout.shard_rows(shard)
            if load == fused.loader.load_region or fused.layout.format.one_maximum:
                region = Region(None, (low, high), (0, COLUMNS))
                load(weights()[f"model.layers.{layer}.{shard}"], region)
    return fused.tensors()


def equal(got: Tensors, want: Tensors) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


def engine_loop(fused: list[Fused], tensors: Iterator[tuple[str, LazyTensor]]) -> None:
    for name, tensor in tensors:
        if ".layers." in name:
            _, _, layer, shard = name.split(".")
            fused[int(layer)].load(tensor, shard)


@pytest.mark.parametrize("scheme", LINEAR)
@pytest.mark.parametrize("arrived", [False, True])
def test_layers_of_several_tensors_get_the_bytes_of_their_parts(folder: Path, scheme: str, arrived: bool) -> None:
    fused = [Fused(scheme, f"model.layers.{layer}") for layer in range(2)]
    if arrived:
        arrivals, tensors = Arrivals(chunk_bytes=4096), list(weights().items())
        random.Random(scheme).shuffle(tensors)
        engine_loop(fused, ((name, arrivals.wrap(tensor)) for name, tensor in tensors))
        arrivals.flush()
    else:
        with opened(folder) as origin:
            engine_loop(fused, origin.tensors())
        assert origin.totals.materialized == []
        assert origin.totals.read.bytes_read >= sum(t.nbytes for name, t in weights().items() if ".layers." in name)
    for layer, each in enumerate(fused):
        assert len(each.finished) == 1
        assert equal(each.tensors(), expected(scheme, layer))


def test_only_what_is_copied_is_read(folder: Path) -> None:
    with opened(folder) as origin:
        tensors = dict(origin.tensors())
        assert origin.totals.read.bytes_read == 0
        target = torch.empty(16, COLUMNS)
        target.copy_(tensors["model.layers.1.q"][8:24])
        assert torch.equal(target, weights()["model.layers.1.q"][8:24].float())
        assert origin.totals.read.bytes_read == 16 * COLUMNS * 2
        assert origin.totals.runs == 1


TARGETS: list[tuple[str, Callable[[], Tensor]]] = [
    ("model.norm", lambda: torch.empty(COLUMNS, dtype=torch.bfloat16)),
    ("model.norm", lambda: torch.empty(COLUMNS, 2)[:, 1]),
    ("model.scalar", lambda: torch.empty(())),
    ("model.scalar", lambda: torch.empty(1, dtype=torch.float64)[0]),
    ("model.conv", lambda: torch.empty(4, 2, 6, dtype=torch.bfloat16)),
    ("model.conv", lambda: torch.empty(6, 4, 2).permute(1, 2, 0)),
    ("model.conv", lambda: torch.empty(8, 2, 6)[::2]),
    ("model.layers.0.k", lambda: torch.empty(COLUMNS, 32).T),
]


@pytest.mark.parametrize("number", range(len(TARGETS)))
def test_a_copy_is_there_when_it_returns_whatever_the_target_looks_like(folder: Path, number: int) -> None:
    name, make = TARGETS[number]
    with opened(folder) as origin:
        for found, tensor in origin.tensors():
            if found == name:
                target = make()
                target.copy_(tensor)
                assert torch.equal(target, weights()[name].to(target.dtype))
    assert origin.totals.materialized == []


def test_what_is_computed_of_a_tensor_is_counted(folder: Path) -> None:
    with opened(folder) as origin:
        for name, tensor in origin.tensors():
            if name == "model.conv":
                assert torch.equal(-tensor, -weights()[name])
                assert torch.equal(tensor * 2, weights()[name] * 2)
    assert origin.totals.materialized == [("neg", (4, 2, 6), 96)]


def test_with_immediate_reads_nothing_waits(folder: Path) -> None:
    fused, seen = Fused("quark_mxfp4", "model.layers.0"), []
    with opened(folder, immediate=True) as origin:
        for name, tensor in origin.tensors():
            if name.startswith("model.layers.0."):
                fused.load(tensor, name.rpartition(".")[2])
                seen.append(fused.parameter.tracker.complete)
    assert seen == [False, False, True]
    assert equal(fused.tensors(), expected("quark_mxfp4", 0))


def copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def test_an_engine_may_call_from_many_threads_and_after_the_last_tensor(folder: Path) -> None:
    fused = [Fused("nvfp4", f"model.layers.{layer}") for layer in range(2)]
    norm = torch.empty(COLUMNS)
    with opened(folder) as origin, ThreadPoolExecutor(4) as pool:
        tensors = dict(origin.tensors())
        calls = [
            pool.submit(fused[int(name.split(".")[2])].load, tensor, name.split(".")[3])
            for name, tensor in tensors.items()
            if ".layers." in name
        ]
        calls.append(pool.submit(copy, norm, tensors["model.norm"]))
        for call in calls:
            call.result()
        origin.flush()
    assert torch.equal(norm, weights()["model.norm"].float())
    assert all(equal(each.tensors(), expected("nvfp4", layer)) for layer, each in enumerate(fused))


def test_little_waits_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "READ_AT_ONCE", 1)
    fused = [Fused("quark_mxfp4", f"model.layers.{layer}") for layer in range(2)]
    with opened(folder) as origin:
        engine_loop(fused, origin.tensors())
    assert origin.totals.runs == 6


@pytest.mark.parametrize("arrived", [False, True])
def test_what_never_came_is_named_where_scales_wait_for_it(folder: Path, arrived: bool) -> None:
    fused = Fused("nvfp4", "model.layers.0")
    if arrived:
        arrivals = Arrivals()
        fused.load(arrivals.wrap(weights()["model.layers.0.q"]), "q")
        with pytest.raises(MissingWeightsError, match=r"parts of model\.layers\.0\.qkv\.weight never arrived"):
            arrivals.flush()
        arrivals.flush()
        return
    with opened(folder) as origin:
        for name, tensor in origin.tensors():
            if name == "model.layers.0.q":
                fused.load(tensor, "q")
        with pytest.raises(MissingWeightsError, match=r"model\.layers\.0\.qkv\.weight"):
            origin.flush()


def test_values_that_are_not_finite_are_found_in_what_is_kept(tmp_path: Path) -> None:
    save_file({"norm": torch.tensor([1.0, torch.inf, 2.0])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with opened(tmp_path) as origin:
        torch.empty(3).copy_(dict(origin.tensors())["norm"])
    assert [(each.name, each.infinite) for each in origin.non_finite.found()] == [("norm", 1)]
    with (
        opened(tmp_path, options=LoadOptions(strict=True)) as origin,
        pytest.raises(NonFiniteWeightError, match="norm is not finite at index"),
    ):
        torch.empty(3).copy_(dict(origin.tensors())["norm"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.3.mlp.experts.7.w1.weight", "model.layers.3"), ("lm_head.weight", ""), ("h.0.ln.weight", "h.0")],
)
def test_the_layer_of_a_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("scheme", ["int8_per_channel", "nvfp4"])
def test_what_a_thread_asks_for_while_the_last_is_read_is_read_the_next_time(folder: Path, scheme: str) -> None:
    fused, late = Fused(scheme, "attn"), iter([True])
    with opened(folder) as origin:
        tensors = dict(origin.tensors())
        read = origin._read_waiting

        def read_and_be_asked(with_other_ranks: bool = False) -> None:
            read(with_other_ranks)
            for _ in late:
                for shard in SHARDS:
                    fused.load(tensors[f"model.layers.0.{shard}"], shard)

        origin._read_waiting = read_and_be_asked  # type: ignore[method-assign]
        origin.flush()
        assert not fused.finished
        origin.flush()
    assert equal(fused.tensors(), expected(scheme, 0))
