"""A load that an engine drives: what it is handed, and what is said of it in the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from quantload.engines.closures import quantized_linear
from quantload.engines.engine_load import REPORT, EngineLoad, tell
from quantload.errors import MissingWeightsError
from quantload.memory.report import LoadReport
from quantload.online.storage import FinalStorage
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from safetensors.torch import save_file
from torch import Tensor, nn

CPU = torch.device("cpu")


class Model(nn.Module):
    """A quantized linear layer and a kept one, which load themselves as an engine's do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Module(), nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
        scheme = SchemeFactory(CPU, LoadOptions()).linear("int8_per_channel")
        quantized_linear(
            *(self.up, "up", scheme, (("", 32),), 64, FinalStorage(CPU)),  # type: ignore[arg-type]
            *(lambda param, weight: param.data.copy_(weight), torch.bfloat16, {}),
        )

    def load_weights(self, tensors: list[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            param = self.get_parameter(name)
            if hasattr(param, "weight_loader"):
                param.weight_loader(param, tensor)
            else:
                param.data.copy_(tensor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = {"up.weight": torch.randn(32, 64), "head.weight": torch.full((8, 64), float("inf"))}
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, tmp_path / "model.safetensors")
    save_file({"more.weight": torch.zeros(4)}, tmp_path / "other.safetensors")
    return tmp_path


def loaded(folder: Path) -> tuple[Model, EngineLoad, LoadReport]:
    model = Model()
    with EngineLoad(model, LoadOptions(), CPU, {"head": ("linear", "output head"), "nobody": ("linear", "")}) as load:
        model.load_weights(list(load.tensors(str(folder), [str(folder / "model.safetensors")])))
        load.flush()
        report = load.report("model", "int8_per_channel")
    return model, load, report


def test_what_a_load_reports(folder: Path) -> None:
    model, load, report = loaded(folder)
    assert load.names == {"up.weight", "head.weight"}  # of the file that was wanted
    assert load.materialized == []
    (layer,), (kept,) = report.layers, report.kept
    assert (layer.name, layer.kind, layer.scheme, layer.bytes_in) == ("up", "linear", "int8_per_channel", 32 * 64 * 2)
    assert (kept.name, kept.reason) == ("head", "output head")
    assert report.bytes_read == 32 * 64 * 2 + 8 * 64 * 2
    assert [found.name for found in report.non_finite] == ["head.weight"]
    assert bool(model.head.weight.isinf().all())


def test_what_the_engine_asks_for_behind_the_last_tensor_is_read_in_the_end(folder: Path) -> None:
    """As threads of an engine may."""
    model, _, report = loaded(folder)  # `list` has taken all tensors before the first one is copied
    assert int(model.up.get_parameter("weight").count_nonzero()) > 1000
    assert len(report.layers) == 1


def test_a_checkpoint_that_is_quantized_is_decoded_on_its_way(folder: Path, tmp_path: Path) -> None:
    """Into layers that quantize it anew, and into those that keep values."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, shape in {"up": (32, 64), "head": (8, 64)}.items():
        codes, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.tensor(0.5)
        stored |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        values[f"{name}.weight"] = codes.float() * scale
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    for path, tensors, config in (
        (quantized, stored, {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}),
        (plain, values, {}),
    ):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    (model, load, report), (other, *_) = loaded(quantized), loaded(plain)
    assert load.names == {"up.weight", "head.weight"}
    assert load.materialized == []
    assert torch.equal(model.head.weight, values["head.weight"].to(torch.bfloat16))
    for name in ("weight", "weight_scale"):
        assert torch.equal(model.up.get_parameter(name).data, other.up.get_parameter(name).data)
    assert report.bytes_read == 40 * 64 + 2 * 4


def test_a_line_in_the_log_and_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, load, report = loaded(folder)
    monkeypatch.setenv(REPORT, str(tmp_path / "report.json"))
    log = logging.getLogger("an engine")
    with caplog.at_level(logging.INFO, "an engine"):
        tell(report, len(load.materialized), log)
        report.rank, report.world_size = 1, 2
        tell(report, 0, log)
        monkeypatch.setenv(REPORT, str(tmp_path / "of {rank}.json"))
        tell(report, 0, log)
    first, second, _ = (record.getMessage() for record in caplog.records if record.name == "an engine")
    assert "quantload: int8_per_channel, quantized_layers=1, kept_layers=1, read 5" in first
    assert "quantload: rank 1 of 2, int8_per_channel" in second
    files = ["report.json", "report.json.rank1", "of 1.json"]
    assert [len(LoadReport.load(tmp_path / name).layers) for name in files] == [1, 1, 1]


def test_a_load_that_fails_lets_go_of_the_model(folder: Path) -> None:
    model = Model()
    load = EngineLoad(model, LoadOptions(), CPU, {})

    def give_up() -> None:
        with load:
            next(load.tensors(str(folder), ["model.safetensors"]))
            raise MissingWeightsError("the engine gave up")

    with pytest.raises(MissingWeightsError, match="gave up"):
        give_up()
    assert load._recorder._assignments == {}
