"""Ranks have slices of the codes and scales of one process; they are threads here, with real collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from quantload.checkpoint import FileSource, read_index
from quantload.checkpoint.resolve import resolve
from quantload.engines.closures import EngineLayer, quantized_experts, quantized_linear
from quantload.engines.experts_host import EngineExperts
from quantload.engines.origin import CheckpointOrigin
from quantload.engines.rank_maxima import Division, RankMaxima, expert_divisions
from quantload.errors import PolicyError, RankError
from quantload.online.storage import FinalStorage
from quantload.options import LoadOptions
from quantload.schemes.registry import ENTRIES, SchemeFactory
from safetensors.torch import save_file
from torch import Tensor, nn

CPU = torch.device("cpu")
RANKS = 2
LAYERS, HIDDEN, EXPERTS = 2, 128, 3
QKV = {"q": 256, "k": 128, "v": 128}
SPANNING = [
    entry.name
    for entry in ENTRIES
    if entry.linear is not None and any(not scale.block_cols for scale in entry.linear.scales)
]
"""Schemes with scales that reach over all columns."""
R = TypeVar("R")


class Layer(nn.Module):
    """Attention and experts of an engine: q, k and v merged and cut by rows, o by columns; so are up and down."""

    qkv: nn.Module
    o: nn.Module
    experts: nn.Module

    def __init__(self, name: str, scheme: str, rank: int, ranks: int, maxima: RankMaxima | None) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.qkv, self.o, self.experts = nn.Module(), nn.Module(), nn.Module()
        schemes, storage = SchemeFactory(CPU, LoadOptions()), FinalStorage(CPU)
        self.states: list[EngineLayer] = []
        shards = tuple((name, rows // ranks) for name, rows in QKV.items())
        for module, own, rows, columns, dim in (
            (self.qkv, "qkv", shards, HIDDEN, 0),
            (self.o, "o", (("o", HIDDEN),), HIDDEN // ranks, 1),
        ):
            found: Any = schemes.linear(scheme)
            division = Division(maxima, rows=ranks > 1 and dim == 0, columns=ranks > 1 and dim == 1)
            args = found, rows, columns, storage, self.load, torch.bfloat16, {"dim": dim}, division
            self.states.append(quantized_linear(module, f"{name}.{own}", *args))
        inner = HIDDEN // ranks
        self.states.append(
            quantized_experts(
                self.experts,
                f"{name}.experts",
                schemes.experts(scheme),  # type: ignore[arg-type]
                EXPERTS,
                {"w13_weight": ((("w1", inner), ("w3", inner)), HIDDEN), "w2_weight": ((("w2", HIDDEN),), inner)},
                EngineExperts(),
                storage,
                self.load_expert,
                torch.bfloat16,
                lambda expert: expert,
                divisions=expert_divisions(maxima, ranks > 1),
            )
        )

    def load(self, param: Any, loaded: Tensor, shard: str) -> None:
        size = loaded.shape[param.dim] // self.ranks
        own = loaded.narrow(param.dim, self.rank * size, size)
        first = {"k": QKV["q"], "v": QKV["q"] + QKV["k"]}.get(shard, 0) // self.ranks
        param.data.narrow(0, first, own.shape[0]).copy_(own)

    def load_expert(self, param: Any, loaded: Tensor, name: str, shard: str, expert: int) -> None:
        dim = 1 if shard == "w2" else 0
        size = loaded.shape[dim] // self.ranks
        own = loaded.narrow(dim, self.rank * size, size)
        param.data[expert].narrow(0, size if shard == "w3" else 0, own.shape[0]).copy_(own)

    def take(self, name: str, tensor: Tensor) -> None:
        *_, part = name.split(".")
        if part.isdecimal():
            shard = name.split(".")[-2]
            param: Any = getattr(self.experts, "w2_weight" if shard == "w2" else "w13_weight")
            param.weight_loader(param, tensor, name, shard, int(part))
        else:
            param = self.o.weight if part == "o" else self.qkv.weight
            param.weight_loader(param, tensor, part)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.data for name, tensor in self.named_parameters()}


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Those of all layers, whose halves differ in size, so that no rank finds the scales by itself."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**{name: (rows, HIDDEN) for name, rows in QKV.items()}, "o": (HIDDEN, HIDDEN)}
    shapes |= {f"{shard}.{expert}": (HIDDEN, HIDDEN) for expert in range(EXPERTS) for shard in ("w1", "w2", "w3")}
    found = {}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator)
            values[shape[0] // 2 :] *= 3
            values[:, HIDDEN // 2 :] *= 2
            found[f"layers.{layer}.{name}"] = values.to(torch.bfloat16)
    return found


def all_ranks(work: Callable[[int, RankMaxima], R]) -> list[R]:
    """What each rank of a group makes, as threads that find each other in a store."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def rank(number: int) -> R:
        group: Any = dist.ProcessGroupGloo(store, number, RANKS, timedelta(seconds=60))
        return work(number, RankMaxima(group))

    with ThreadPoolExecutor(RANKS) as threads:
        return [each.result() for each in [threads.submit(rank, number) for number in range(RANKS)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(weights(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def load(folder: Path, layers: Sequence[Layer], lazy: bool) -> None:
    with ExitStack() as opened:
        tensors: Iterator[tuple[str, Tensor]] = iter(weights().items())
        if lazy:
            checkpoint = resolve(folder)
            options = LoadOptions(chunk_bytes=16384, workers=2)
            origin = CheckpointOrigin(read_index(checkpoint), FileSource(checkpoint.root), options, CPU)
            tensors = opened.enter_context(origin).tensors()
        for name, tensor in tensors:
            layers[int(name.split(".")[1])].take(name.split(".", 2)[2], tensor)
        for layer in layers:
            for state in layer.states:
                state.check_complete(may_be_made_up=False)


def expected(whole: Mapping[str, Tensor], own: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The slices of the tensors of one process that a rank has to have."""

    def halves(tensor: Tensor, dim: int, sizes: Sequence[int], like: Tensor) -> Tensor:
        if tensor.shape[dim] == like.shape[dim]:
            return tensor
        count = tensor.shape[dim]
        parts = tensor.split([size * count // sum(sizes) for size in sizes], dim)
        return torch.cat([part.chunk(RANKS, dim)[rank] for part in parts], dim)

    found = {}
    for name, tensor in whole.items():
        by_columns = name.startswith(("o.", "experts.w2"))
        sizes = [1] if by_columns else [1, 1] if name.startswith("experts") else [*QKV.values()]
        found[name] = halves(tensor, -1 if by_columns else -2, sizes, own[name])
    return found


@pytest.mark.parametrize("lazy", [True, False], ids=["from a file", "in memory"])
@pytest.mark.parametrize("scheme", SPANNING)
def test_ranks_have_slices_of_what_one_process_has(scheme: str, lazy: bool, folder: Path) -> None:
    whole = [Layer(f"layers.{layer}", scheme, 0, 1, None) for layer in range(LAYERS)]
    load(folder, whole, lazy)

    def rank(number: int, maxima: RankMaxima) -> list[dict[str, Tensor]]:
        layers = [Layer(f"layers.{layer}", scheme, number, RANKS, maxima) for layer in range(LAYERS)]
        load(folder, layers, lazy)
        return [layer.tensors() for layer in layers]

    for number, layers in enumerate(all_ranks(rank)):
        for one, own in zip(whole, layers, strict=True):
            for name, tensor in expected(one.tensors(), own, number).items():
                assert torch.equal(tensor.view(torch.uint8), own[name].view(torch.uint8)), name


def test_ranks_that_bring_weights_in_different_orders_are_told(folder: Path) -> None:
    def rank(number: int, maxima: RankMaxima) -> None:
        layer = Layer("layers.0", "fp8_per_channel", number, RANKS, maxima)
        tensors = [item for item in weights().items() if item[0].startswith("layers.0.w2.")]
        for name, tensor in tensors if number == 0 else reversed(tensors):
            layer.take(name.split(".", 2)[2], tensor)

    with pytest.raises(RankError, match=r"different orders.*expert (0|2) comes first"):
        all_ranks(rank)


def test_ranks_that_cannot_ask_each_other_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"o\.weight: in fp8_channel elements .* share a scale, .* no group"):
        Layer("layers.0", "fp8_per_channel", 0, RANKS, None)
    Layer("layers.0", "quark_mxfp4", 0, RANKS, None)  # every scale is of one rank
