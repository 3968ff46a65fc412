"""Heads and embeddings that are tied, and an override by name: a weight for each, made from the one tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload import (
    LoadOptions,
    QuantizationPolicy,
    convert_checkpoint,
    load_quantized,
    plan_quantized,
    reload_weights,
)
from quantload.errors import MissingWeightsError, UnappliedOptionError
from quantload.model.embeddings import QuantizedEmbedding
from quantload.model.quantized import QuantizedLinear
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file

Checkpoint = Callable[[str], Path]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.tensor([[0, 5, 6, 159], [7, 7, 1, 2]])
BY_ROWS = [
    entry.name
    for entry in ENTRIES
    if entry.linear is not None and all(scale.block_rows in (0, 1) for scale in entry.linear.scales)
]


def policy(*names: str, scheme: str = "int8_per_channel") -> QuantizationPolicy:
    return QuantizationPolicy(overrides=tuple((name, scheme) for name in names))


@pytest.mark.parametrize("named", [(HEAD,), (EMBEDDING,), (HEAD, EMBEDDING)])
def test_what_an_override_names_is_quantized_and_the_other_one_is_as_it_was(
    checkpoint: Checkpoint, named: tuple[str, ...]
) -> None:
    path, rules = checkpoint("llama_tied"), policy(*named)
    model: Any = load_quantized(path, policy=rules, device="cpu")
    plain: Any = load_quantized(path, "none", device="cpu")
    assert isinstance(model.lm_head, QuantizedLinear) == (HEAD in named)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding) == (EMBEDDING in named)
    for layer, name in ((model.lm_head, HEAD), (model.model.embed_tokens, EMBEDDING)):
        if name in named:
            torch.testing.assert_close(layer.dequantize(), plain.lm_head.weight.float(), atol=4e-3, rtol=0)
        else:
            assert torch.equal(layer.weight, plain.lm_head.weight)
    assert {layer.name: layer.kind for layer in model.load_report.layers if layer.name in (HEAD, EMBEDDING)} == {
        name: "linear" if name == HEAD else "embedding" for name in named
    }
    planned = plan_quantized(path, policy=rules, device="cpu")
    assert planned.plan.memory.final_bytes == model.load_report.final_bytes
    assert not planned.unapplied
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # it has nothing to tie any more
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("scheme", BY_ROWS)
def test_an_embedding_gives_the_rows_that_its_codes_stand_for(checkpoint: Checkpoint, scheme: str) -> None:
    model: Any = load_quantized(checkpoint("llama_tied"), "none", policy=policy(EMBEDDING, scheme=scheme), device="cpu")
    table = model.model.embed_tokens
    assert torch.equal(table(IDS), table.dequantize()[IDS].to(model.dtype))
    assert table(IDS[:, :0]).shape == (2, 0, table.embedding_dim)
    with pytest.raises(IndexError):
        table(torch.tensor([table.num_embeddings]))


def test_a_converted_and_a_cached_model_are_the_loaded_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path, rules = checkpoint("llama_tied"), policy(HEAD, EMBEDDING)
    options = LoadOptions(activations="none", cache=tmp_path / "cache")
    model: Any = load_quantized(path, "int8_per_channel", policy=rules, options=options, device="cpu")
    wanted = model(IDS).logits
    report = convert_checkpoint(path, tmp_path / "out", "int8_per_channel", format="compressed-tensors", policy=rules)
    assert report.read_by == ["quantload"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    converted: Any = load_quantized(tmp_path / "out", options=LoadOptions(activations="none"), device="cpu")
    assert isinstance(converted.model.embed_tokens, QuantizedEmbedding)
    assert torch.equal(converted(IDS).logits, wanted)
    again: Any = load_quantized(path, "int8_per_channel", policy=rules, options=options, device="cpu")
    assert again.load_report.cache == "hit"
    assert torch.equal(again(IDS).logits, wanted)
    reload_weights(again, path)
    assert torch.equal(again(IDS).logits, wanted)


def test_a_format_whose_scales_span_rows_leaves_the_embedding_tied_and_says_so(checkpoint: Checkpoint) -> None:
    path, rules = checkpoint("llama_tied"), policy(EMBEDDING, scheme="fp8_per_block")
    model: Any = load_quantized(path, policy=rules, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(UnappliedOptionError, match="tied to another parameter"):
        load_quantized(path, policy=rules, options=LoadOptions(strict=True), device="cpu")


def test_a_pattern_that_does_not_end_with_the_name_unties_nothing(checkpoint: Checkpoint) -> None:
    draft = plan_quantized(checkpoint("llama_tied"), policy=policy("*"), device="cpu")
    assert not draft.untied.ties
    assert EMBEDDING not in {each.name for each in draft.assignments}


def test_more_than_one_tie_stays(checkpoint: Checkpoint) -> None:
    draft = plan_quantized(checkpoint("t5"), policy=policy("lm_head"), device="cpu")
    assert [each.reason for each in draft.unapplied] == ["its weight is tied to another parameter"]


def test_an_update_brings_a_tensor_for_each_of_the_two(checkpoint: Checkpoint) -> None:
    path, rules = checkpoint("llama_tied"), policy(HEAD)
    model: Any = load_quantized(path, policy=rules, device="cpu")
    wanted, stored = model(IDS).logits, load_file(path / "model.safetensors")
    with pytest.raises(MissingWeightsError, match=r"lm_head\.weight"):
        reload_weights(model, stored)
    reload_weights(model, {**stored, "lm_head.weight": stored["model.embed_tokens.weight"]})
    assert torch.equal(model(IDS).logits, wanted)
