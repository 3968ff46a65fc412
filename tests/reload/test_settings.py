"""What a model remembers of its load: little, and all of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from new_weights import changed_copy, different, load
from quantload import reload_weights
from quantload.reload.settings import LoadSettings, TensorNames


def test_names_are_packed() -> None:
    shapes = {"gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}
    given = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight", torch.bfloat16, shape)
        for layer in range(24)
        for expert in range(64)
        for name, shape in shapes.items()
    ]
    names = TensorNames(given)
    assert [(each.name, each.dtype, each.shape) for each in names] == given
    assert len(names) == len(given)
    assert {each.nbytes for each in names} == {2 * 768 * 2048}
    assert names.nbytes < 8 * len(given)
    assert list(TensorNames([])) == []


def test_a_copy_of_a_model_is_reloaded_like_the_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    new = changed_copy(checkpoint("llama"), tmp_path / "new")
    model, fresh = load(checkpoint("llama")), load(new)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.load_settings, LoadSettings)
        reload_weights(other, new, progress=False)
        assert different(other, fresh) == []
    assert different(model, fresh) != []
