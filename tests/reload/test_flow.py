"""New weights from a checkpoint: the bytes and the report of a fresh load, in the memory that was there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from new_weights import changed_copy, check_facts, different, load, other_values, pointers
from quantload import LoadOptions, QuantizationPolicy, reload_weights
from quantload.errors import (
    CheckpointError,
    IncompleteModelError,
    NonFiniteWeightError,
    PolicyError,
    RouteError,
)
from torch import Tensor

Checkpoints = Callable[[str], Path]


def check_reload(folder: Path, target: Path, scheme: str) -> None:
    new = changed_copy(folder, target)
    model, fresh = load(folder, scheme), load(new, scheme)
    where, before = pointers(model), different(model, fresh)
    report = reload_weights(model, new, progress=False)
    assert before
    assert different(model, fresh) == []
    assert pointers(model) == where
    check_facts(report, fresh.load_report)
    assert model.load_report is report


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [("llama", "quark_mxfp4"), ("qwen3_moe", "fp8_per_tensor"), ("gpt_oss", "int4_per_group"), ("llama_tied", "none")],
)
def test_a_reload_is_a_fresh_load_in_the_same_memory(
    checkpoint: Checkpoints, tmp_path: Path, architecture: str, scheme: str
) -> None:
    check_reload(checkpoint(architecture), tmp_path / "new", scheme)


def test_policy_and_options_are_those_of_the_first_load(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder, new = checkpoint("qwen3_moe"), changed_copy(checkpoint("qwen3_moe"), tmp_path / "new")
    policy = QuantizationPolicy(experts="int8_per_channel", ignore=("*.q_proj",), overrides=(("*.k_proj", "mxfp8"),))
    options = LoadOptions(stats=False, digest=True, cache=tmp_path / "cache", chunk_bytes=4096, workers=1)
    model = load(folder, "fp8_per_block", policy=policy, options=options)
    fresh = load(new, "fp8_per_block", policy=policy, options=replace(options, cache=None))
    report = reload_weights(model, new, progress=False)
    assert different(model, fresh) == []
    assert report.digest == fresh.load_report.digest
    check_facts(report, fresh.load_report)
    assert report.cache is None


def test_what_fails_part_way_marks_the_model_and_a_second_attempt_repairs_it(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoint("llama")

    def with_nan(name: str, tensor: Tensor) -> Tensor:
        tensor = other_values(name, tensor)
        if name.endswith("1.mlp.down_proj.weight"):
            tensor[3, 5] = torch.nan
        return tensor

    bad, good = changed_copy(folder, tmp_path / "bad", with_nan), changed_copy(folder, tmp_path / "good")
    model, fresh, inputs = load(folder), load(good), architectures.BY_NAME["llama"].inputs()
    where = pointers(model)
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.down_proj\.weight .* index \[3, 5\]"):
        reload_weights(model, bad, progress=False)
    assert model.load_report.state == "incomplete"
    for part in (model, model.model):
        with pytest.raises(IncompleteModelError, match=r"a part of its new weights only: the reload of .*bad"):
            part(**inputs)
    with pytest.raises(IncompleteModelError):
        model.generate(**inputs, max_new_tokens=1)
    reload_weights(model, good, progress=False)
    assert model.load_report.state == "complete"
    assert different(model, fresh) == []
    assert pointers(model) == where
    assert torch.equal(architectures.logits(model, inputs), architectures.logits(fresh, inputs))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    model, fresh = load(checkpoint("llama")), load(checkpoint("llama"))
    with pytest.raises(RouteError):
        reload_weights(model, checkpoint("qwen3_moe"), progress=False)
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(3, 3, dtype=torch.uint8)
    with pytest.raises(PolicyError, match=r"1 tensors of the model .*up_proj\.weight \(uint8 \[3, 3\] in the model"):
        reload_weights(model, checkpoint("llama"), progress=False)
    assert model.load_report.state == "complete"
    assert different(model, fresh) == ["model.layers.0.mlp.up_proj.weight"]


def test_what_was_not_loaded_here_is_refused(checkpoint: Checkpoints) -> None:
    model: Any = architectures.reference(checkpoint("llama"), architectures.BY_NAME["llama"])
    with pytest.raises(PolicyError, match="LlamaForCausalLM does not say how it was loaded"):
        reload_weights(model, checkpoint("llama"))


def test_tied_weights_that_come_twice_must_be_equal(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint("llama_tied")
    for name, factor in (("equal", 1.0), ("unequal", 2.0)):
        new = changed_copy(folder, tmp_path / name)
        tensors = load_file(new / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    model, fresh = load(folder), load(tmp_path / "equal")
    reload_weights(model, tmp_path / "equal", progress=False)
    assert different(model, fresh) == []
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor"):
        reload_weights(model, tmp_path / "unequal", progress=False)
    assert model.load_report.state == "incomplete"


def test_a_config_that_says_otherwise_is_a_warning(
    checkpoint: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = changed_copy(checkpoint("llama"), tmp_path / "new")
    config = new / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    model = load(checkpoint("llama"))
    with caplog.at_level(logging.WARNING, logger="quantload"):
        reload_weights(model, new, progress=False)
    assert "rms_norm_eps 0.5, in the model 1e-06" in caplog.text
    assert model.config.rms_norm_eps == 1e-06
