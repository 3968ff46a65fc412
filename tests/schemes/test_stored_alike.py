"""What is read of many modules at once is what is read of each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stored_tensors
import torch
from quantload.errors import CheckpointError
from quantload.schemes.stored.weights import StoredWeight
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data" / "stored"
FOLDERS = sorted(path.name for path in DATA.iterdir() if path.is_dir() and "gptoss" not in path.name)


def said(weight: StoredWeight) -> tuple[Any, ...]:
    """All of a weight but the functions that convert its parts, of which there may be one for each weight."""
    return weight._replace(parts=()), [(part.role, part.entry, part.block) for part in weight.parts]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_module_is_what_it_is_alone(name: str) -> None:
    config = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    tensors = load_file(DATA / name / "model.safetensors")
    together = stored_tensors.read(config, tensors)
    assert len(together.weights) > 1
    for key, weight in together.weights.items():
        module = key.rpartition(".")[0]
        own = {tensor: value for tensor, value in tensors.items() if tensor.rpartition(".")[0] == module}
        alone = stored_tensors.read(config, own)
        assert said(weight) == said(alone.weights[key])
        assert {tensor: together.unused.get(tensor) for tensor in alone.unused} == alone.unused


STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


def linear(name: str, scale: float) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.tensor(scale),
        f"{name}.input_scale": torch.tensor(scale),
        f"{name}.k_scale": torch.tensor(scale),
    }


def test_each_has_its_own_tensors() -> None:
    stored = stored_tensors.read(STATIC, {**linear("a", 1.0), **linear("b", 2.0)})
    for name in "ab":
        weight = stored.weights[f"{name}.weight"]
        assert [part.entry.name for part in weight.parts] == [f"{name}.weight", f"{name}.weight_scale"]
        assert weight.input_scale is not None
        assert weight.input_scale.name == f"{name}.input_scale"
        assert f"{name}.k_scale" in stored.unused


def test_one_that_lacks_a_tensor_is_not_like_the_others() -> None:
    tensors = {**linear("a", 1.0), **linear("b", 2.0)}
    del tensors["b.input_scale"]
    weights = stored_tensors.read(STATIC, tensors).weights
    assert weights["a.weight"].input_scale is not None
    assert weights["b.weight"].input_scale is None
    del tensors["b.weight_scale"]
    with pytest.raises(CheckpointError, match=r"b\.weight_scale is missing"):
        stored_tensors.read(STATIC, tensors)
