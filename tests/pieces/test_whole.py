"""Conversions that compute instead of moving: transformers' own operation on whole tensors, and the report says so."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, logits, reference
from quantload import LoadOptions, load_quantized, plan_quantized, reload_weights
from quantload.checkpoint.crew import Crew
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError, LoadCancelledError, NonFiniteWeightError
from quantload.model.transformers_api import Conversion
from quantload.pieces.whole import WholeConversion, plan_whole
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

Checkpoint = Callable[[str], Path]


class Halve(ConversionOps):  # type: ignore[misc]
    """Arithmetic: no movement of elements describes it."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {name: self._half(value) for name, value in input_dict.items()}

    def _half(self, value: Any) -> Any:
        return [x * 0.5 for x in value] if isinstance(value, list) else value * 0.5

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


@pytest.fixture
def halving(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    """While this lasts, Qwen3-MoE checkpoints hold experts and key projections of twice their size."""
    checkpoint("qwen3_moe")  # is written with the mapping that transformers has
    mapping = [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1), Halve()],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
        WeightConverter("self_attn.k_proj.weight", "self_attn.k_proj.weight", operations=[Halve()]),
        WeightConverter("self_attn.k_norm.weight", "self_attn.k_norm.weight", operations=[Halve()]),
    ]
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(cache, "qwen3_moe", mapping)


GROUPS = 2 * 3
"""Two layers, each with gate-up, key projection and key norm; what only moves, down_proj, is not among them."""


@pytest.mark.usefixtures("halving")
def test_the_model_is_the_one_transformers_makes(checkpoint: Checkpoint) -> None:
    path, architecture = checkpoint("qwen3_moe"), BY_NAME["qwen3_moe"]
    want = reference(path, architecture)
    got = load_quantized(path, "none")
    assert list(got.state_dict()) == list(want.state_dict())
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert torch.equal(logits(got, architecture.inputs()), logits(want, architecture.inputs()))
    assert got.load_report.fallback_conversions == GROUPS


@pytest.mark.usefixtures("halving")
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor", "fp8_per_block", "nvfp4"])
@pytest.mark.parametrize("workers", [1, 4])
def test_its_codes_are_those_of_the_converted_weights(scheme: str, workers: int, checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3_moe")
    want = reference(path, BY_NAME["qwen3_moe"])
    got = load_quantized(path, scheme, options=LoadOptions(workers=workers, chunk_bytes=4096))
    assert got.load_report.fallback_conversions == GROUPS
    experts = "model.layers.1.mlp.experts"
    for name, parameter in ((experts, "gate_up_proj"), ("model.layers.0.self_attn.k_proj", "weight")):
        module = got.get_submodule(name)
        values = module.dequantize(parameter)
        converted = want.get_submodule(name).get_parameter(parameter).float()
        assert float((values - converted).norm() / converted.norm()) < 0.15
        assert float((values - 2 * converted).norm() / converted.norm()) > 0.5


@pytest.mark.usefixtures("halving")
def test_the_plan_knows_and_its_peak_has_room_for_the_group(checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3_moe")
    with_groups = plan_quantized(path).plan
    assert with_groups.whole_conversions == GROUPS
    gate_up = 4 * 2 * 32 * 64 * 2
    assert with_groups.memory.slack_bytes >= (64 << 20) + 2 * gate_up


def of_one_tensor(name: str) -> Conversion:
    conversion = Conversion(name, None)
    conversion.add(None, [name])
    return conversion


def test_a_third_group_waits_until_one_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeConversion, "run", lambda group, tensors: tensors.clear())
    entries = {name: TensorEntry(name, torch.float32, (4,), 0, 0, 16) for name in "abc"}
    nothing: Any = None
    pieces = [*plan_whole([*map(of_one_tensor, entries)], entries, nothing, {}, nothing)]
    targets: Any = [piece.target for piece in pieces]
    assert [target().nbytes for target in targets[:2]] == [16, 16]
    leaving = threading.Event()
    leaving.set()
    with pytest.raises(LoadCancelledError):  # it would wait, and leaves
        Crew(1, leaving).work(lambda *_: targets[2]())
    pieces[0].deliver(nothing)
    Crew(1, leaving).work(lambda *_: targets[2]())


@pytest.mark.usefixtures("halving")
def test_tensors_that_come_again_before_or_after_they_are_converted_are_replaced(checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3_moe")
    want, got = load_quantized(path), load_quantized(path)
    new = load_file(path / "model.safetensors")
    old = {name: tensor * 3 for name, tensor in new.items()}
    one = "model.layers.0.mlp.experts.2.up_proj.weight"
    for before in ({one: old[one]}, old):
        reload_weights(got, iter([*before.items(), *new.items()]))
        for name, tensor in want.state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor), name


def test_without_such_a_conversion_there_is_no_fallback(checkpoint: Checkpoint) -> None:
    assert load_quantized(checkpoint("qwen3_moe")).load_report.fallback_conversions == 0


def changed(source: Path, folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a checkpoint in which one tensor is another one."""
    for file in source.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    (shard,) = source.glob("*.safetensors")
    tensors = load_file(shard)
    save_file(tensors | {name: change(tensors[name])}, folder / shard.name, metadata={"format": "pt"})
    return folder


UP_PROJ = "model.layers.1.mlp.experts.2.up_proj.weight"
K_NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.usefixtures("halving")
def test_a_weight_of_a_group_that_is_not_finite_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = changed(checkpoint("qwen3_moe"), tmp_path, UP_PROJ, lambda values: torch.full_like(values, torch.nan))
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_quantized(path)


@pytest.mark.usefixtures("halving")
@pytest.mark.parametrize("scheme", ["none", "quark_mxfp4"])
@pytest.mark.parametrize(
    ("name", "dtype", "parameter"),
    [
        (UP_PROJ, torch.float8_e4m3fn, "model.layers.1.mlp.experts.gate_up_proj"),
        (UP_PROJ, torch.uint8, "model.layers.1.mlp.experts.gate_up_proj"),
        (K_NORM, torch.float8_e4m3fn, K_NORM),
    ],
)
def test_codes_of_a_group_that_no_config_explains_are_an_error(
    name: str, dtype: torch.dtype, parameter: str, scheme: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = changed(checkpoint("qwen3_moe"), tmp_path, name, lambda values: values.to(dtype))
    message = f"{re.escape(name)} is {dtype}, .* not the values of {re.escape(parameter)}, and no quantization_config"
    with pytest.raises(CheckpointError, match=message):
        load_quantized(path, scheme)


@pytest.mark.usefixtures("halving")
@pytest.mark.parametrize("scheme", ["none", "quark_mxfp4"])
def test_float64_of_a_group_is_converted_in_the_dtype_of_the_parameter(
    scheme: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = changed(checkpoint("qwen3_moe"), tmp_path, UP_PROJ, Tensor.double)
    want, got = (load_quantized(each, scheme).state_dict() for each in (checkpoint("qwen3_moe"), path))
    assert all(torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in want.items())
