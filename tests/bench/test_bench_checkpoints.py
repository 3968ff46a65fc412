"""The synthetic checkpoints: what they claim, and that transformers takes every tensor of them."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
import transformers
from recipes import RECIPES

SMALL = 0.002


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench_work")


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_takes_every_tensor(name: str, work: Path) -> None:
    folder = checkpoints.make(name, SMALL, work)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_the_full_sizes_are_what_the_readme_says() -> None:
    full = {name: recipe(1.0) for name, recipe in RECIPES.items()}
    assert all(3.0e9 < full[name].tensor_bytes < 3.4e9 for name in ("dense", "moe", "huge"))
    assert full["dense"].shards == 5
    assert len(full["tiny"].tensors) == 2001
    largest = max(full["huge"].tensors.values(), key=lambda shape: shape[0] * shape[1] if len(shape) > 1 else 0)
    assert 2 * largest[0] * largest[1] == 2 << 30
    experts = {name.split(".experts.")[1].split(".")[0] for name in full["moe"].tensors if ".experts." in name}
    assert len(experts) >= 64


def test_weights_are_noise_with_the_scale_of_a_trained_layer(work: Path) -> None:
    folder = checkpoints.make("dense", SMALL, work)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weight = model.model.layers[0].mlp.gate_proj.weight.detach().float()
    assert 0.4 < float(weight.std()) * weight.shape[1] ** 0.5 < 3
    assert int((weight == 0).sum()) == 0
    assert not torch.equal(weight, model.model.layers[0].mlp.up_proj.weight.float())


def test_a_finished_checkpoint_is_reused_and_an_unfinished_one_made_again(work: Path) -> None:
    folder = checkpoints.make("tiny", SMALL, work)
    shard = checkpoints.shards_of(folder)[0]
    before = shard.stat().st_mtime_ns
    assert checkpoints.make("tiny", SMALL, work) == folder
    assert shard.stat().st_mtime_ns == before
    (folder / "recipe.json").unlink()
    checkpoints.make("tiny", SMALL, work)
    assert shard.stat().st_mtime_ns != before


def test_too_small_a_disk_is_said_before_anything_is_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "DISK_MARGIN", 1 << 60)
    with pytest.raises(SystemExit, match="GB free"):
        checkpoints.make("dense", 0.003, work)
    assert not (work / "dense-0.003").exists()
