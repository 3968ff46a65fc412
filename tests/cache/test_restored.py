"""Parameters brought back from their own bytes: which pieces are read, and when a layer is finished."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantload.cache.restored import final_tensors, plan_restored
from quantload.checkpoint.headers import TensorEntry
from quantload.checkpoint.pieces import Piece
from quantload.errors import RepeatedRegionError, ShapeMismatchError
from quantload.geometry.regions import Region
from quantload.geometry.spans import Landing
from quantload.model.attach import WeightLoaders
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.online.storage import FinalStorage
from quantload.online.weight_loader import DirectWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn

CPU = torch.device("cpu")
EXPERTS, ROWS, COLUMNS = 2, 6, 40
PARAMETERS = ["norm.weight", "experts.up_proj", "experts.down_proj"]


class Model:
    """A norm and an experts layer, on meta, with their closures."""

    def __init__(self) -> None:
        self.norm, self.experts = nn.Module(), nn.Module()
        self.norm.register_parameter("weight", nn.Parameter(torch.empty(10, device="meta")))
        scheme = SchemeFactory(CPU, LoadOptions()).experts("int8_per_channel")
        assert scheme is not None
        self.experts.has_gate = False  # type: ignore[assignment]
        for name, value in (("is_concatenated", True), ("has_bias", False)):
            setattr(self.experts, name, value)
        sizes: dict[str, Any] = {"up_proj": ((("w3", ROWS),), COLUMNS), "down_proj": ((("w2", COLUMNS),), ROWS)}
        scheme.create_weights(self.experts, num_experts=EXPERTS, **sizes)
        storage = FinalStorage(CPU)
        self.finished: list[Tensor] = []
        moe = MoeOnlineWeightLoader(self.experts, scheme, on_finished=self._finished, storage=storage)  # type: ignore[arg-type]
        self.loaders = WeightLoaders()
        norm = DirectWeightLoader(self.norm, "weight", "norm.weight", torch.bfloat16, storage)
        self.loaders.add("norm.weight", self.norm._parameters["weight"], norm, Landing(None, 1, 10), ["norm.weight"])  # type: ignore[arg-type]
        for name in sizes:
            full = f"experts.{name}"
            param = self.experts._parameters[name]
            assert param is not None
            ((_, rows),), columns = sizes[name]
            landing = Landing(EXPERTS, rows, columns)
            self.loaders.add(full, param, moe.bound(name), landing, [full, f"{full}_scale"])

    def _finished(self, statistics: Tensor, process: Callable[[], None]) -> None:
        process()
        self.finished.append(statistics)

    def entries(self) -> dict[str, TensorEntry]:
        """Tensors one after the other in one file, from byte 8 on."""
        found, at = {}, 8
        for spec in final_tensors(self.loaders, PARAMETERS):
            found[spec.name] = TensorEntry(spec.name, spec.dtype, spec.shape, 0, at, spec.nbytes)
            at += spec.nbytes
        return found


def deliver(pieces: list[Piece], content: bytes) -> None:
    for piece in pieces:
        ((offset, count),) = piece.extents
        assert piece.target is not None
        target = piece.target()
        target.copy_(torch.frombuffer(bytearray(content[offset : offset + count]), dtype=torch.uint8))
        piece.deliver(SimpleNamespace(buffer=target))


def test_final_tensors_are_what_the_model_will_hold() -> None:
    found = {spec.name: (spec.dtype, spec.shape) for spec in final_tensors(Model().loaders, PARAMETERS)}
    assert found == {
        "norm.weight": (torch.bfloat16, (10,)),
        "experts.up_proj": (torch.int8, (EXPERTS, ROWS, COLUMNS)),
        "experts.up_proj_scale": (torch.float32, (EXPERTS, ROWS, 1)),
        "experts.down_proj": (torch.int8, (EXPERTS, COLUMNS, ROWS)),
        "experts.down_proj_scale": (torch.float32, (EXPERTS, COLUMNS, 1)),
    }


@pytest.mark.parametrize("chunk_bytes", [7, 100, 1 << 20])
def test_every_byte_lands_where_it_was_and_the_layer_finishes_once(chunk_bytes: int) -> None:
    model = Model()
    entries = model.entries()
    content = bytes(range(256)) * 8
    statistics = torch.arange(7, dtype=torch.float64)
    pieces = plan_restored(entries, model.loaders, PARAMETERS, {"experts": statistics}, chunk_bytes)
    assert all(piece.nbytes <= chunk_bytes for piece in pieces)
    assert [piece.extents[0][0] for piece in pieces] == sorted(piece.extents[0][0] for piece in pieces)
    deliver(pieces[:-1], content)
    assert not model.finished
    deliver(pieces[-1:], content)
    assert len(model.finished) == 1
    assert torch.equal(model.finished[0], statistics)
    model.loaders.check_complete(PARAMETERS)
    held = {"norm.weight": model.norm._parameters["weight"]}
    held |= {f"experts.{name}": parameter for name, parameter in model.experts._parameters.items()}
    for name, entry in entries.items():
        tensor = held[name]
        assert tensor is not None
        assert bytes(tensor.data.view(-1).view(torch.uint8).tolist()) == content[entry.offset :][: entry.nbytes], name


def test_what_was_restored_is_there_and_may_not_come_again_without_a_reload() -> None:
    model = Model()
    deliver(plan_restored(model.entries(), model.loaders, PARAMETERS, {}, 1 << 20), bytes(2000))
    sink = model.loaders.sinks["experts.up_proj"]
    weight, region = torch.ones(ROWS, COLUMNS), Region(0, (0, ROWS), (0, COLUMNS))
    with pytest.raises(RepeatedRegionError):
        sink.load_region(weight, region)
    sink.reset()
    sink.load_region(weight, region)


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "surplus"])
def test_other_tensors_than_the_models_are_an_error(change: str) -> None:
    model = Model()
    entries = model.entries()
    scale = entries.pop("experts.up_proj_scale")
    if change == "shape":
        entries[scale.name] = scale._replace(shape=(1, *scale.shape))
    elif change == "dtype":
        entries[scale.name] = scale._replace(dtype=torch.int32)
    elif change == "surplus":
        entries |= {scale.name: scale, "extra": scale._replace(name="extra")}
    with pytest.raises(ShapeMismatchError, match=r"extra|experts.up_proj_scale"):
        plan_restored(entries, model.loaders, PARAMETERS, {}, 1 << 20)
