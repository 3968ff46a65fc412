"""Tied parameters, stored under any of their names, or under several: the model that transformers makes of them."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import raw_checkpoint
import torch
import transformers
from architectures import BY_NAME, Architecture, logits, reference
from quantload import LoadOptions, convert_checkpoint, load_quantized, plan_quantized
from quantload.errors import CheckpointError, MissingWeightsError, UnsupportedCheckpointError
from safetensors.torch import save_model
from torch import Tensor
from transformers import PreTrainedModel

Checkpoint = Callable[[str], Path]
Tensors = dict[str, Tensor]

_BART: dict[str, Any] = {
    "vocab_size": architectures.VOCAB,
    "d_model": 32,
    "max_position_embeddings": 64,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
MORE = {
    name: Architecture(
        name,
        class_name,
        partial(getattr(transformers, config_class), **_BART),
        architectures._encoder_decoder,
        dtype=torch.float32,
    )
    for name, class_name, config_class in (
        ("bart", "BartForConditionalGeneration", "BartConfig"),
        ("marian", "MarianMTModel", "MarianConfig"),
    )
}
ARCHITECTURES = BY_NAME | MORE
TIED = [
    *("llama_tied", "gemma3_text", "gemma3", "gpt2", "bert", "t5", "jetmoe", "mobilebert", "nomic_bert", "bart"),
    "marian",
]
"""A head and its embeddings, inside a vision-language model too; a bias with it; three or four names for one."""


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Like `checkpoint`, for the architectures of this module as well."""
    root = tmp_path_factory.mktemp("more")

    def find(name: str) -> Path:
        if name in MORE and not (root / name).exists():
            architectures.save(MORE[name], root / name)
        return root / name if name in MORE else checkpoint(name)

    return find


def groups(model: PreTrainedModel) -> list[list[str]]:
    """The names that share a parameter, as the class says."""
    found: dict[str, list[str]] = defaultdict(list)
    for target, source in model.all_tied_weights_keys.items():
        found[source].append(target)
    return [[source, *targets] for source, targets in found.items()]


def file_names(path: Path, model: PreTrainedModel) -> Mapping[str, str]:
    """What a file calls the parameters of a model: another name where the class renames."""
    renamed = {name: name for name in model.state_dict()}
    if type(model).__name__ == "Gemma3ForConditionalGeneration":
        assert "language_model.model.embed_tokens.weight" in raw_checkpoint.read(path)
        renamed |= {
            "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
            "lm_head.weight": "language_model.lm_head.weight",
        }
    return renamed


def each_alone(name: str, folder: Checkpoint, tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """The checkpoint with one name of each group, for every choice of them."""
    path = folder(name)
    model = reference(path, ARCHITECTURES[name])
    called = file_names(path, model)
    stored = raw_checkpoint.read(path)
    for number, kept in enumerate(itertools.product(*groups(model))):
        tensors = dict(stored)
        for group, keep in zip(groups(model), kept, strict=True):
            (value,) = [tensors.pop(called[each]) for each in group if called[each] in tensors][:1]
            for each in group:
                tensors.pop(called[each], None)
            tensors[called[keep]] = value
        yield [*kept], raw_checkpoint.write(tmp_path / str(number), path, [tensors])


def same_state(got: PreTrainedModel, want: PreTrainedModel) -> None:
    assert got.state_dict().keys() == want.state_dict().keys()
    for key, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor), key


def shared(model: PreTrainedModel) -> set[frozenset[str]]:
    found: dict[int, set[str]] = defaultdict(set)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel():
            found[id(tensor)].add(key)
    return {frozenset(names) for names in found.values() if len(names) > 1}


@pytest.mark.parametrize("name", TIED)
def test_any_one_of_the_names_is_enough(name: str, folder: Checkpoint, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    inputs = architecture.inputs()
    original = reference(folder(name), architecture)
    for kept, path in each_alone(name, folder, tmp_path):
        want, got = reference(path, architecture), load_quantized(path, "none", options=LoadOptions(strict=True))
        same_state(want, original)
        same_state(got, want)
        assert shared(got) == shared(want), kept
        assert torch.equal(logits(got, inputs), logits(original, inputs)), kept
        report = got.load_report
        assert report.untied == report.unexpected == []
        assert report.predicted_final_bytes == report.final_bytes, kept


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "bart"])
def test_what_safetensors_save_model_writes(name: str, folder: Checkpoint, tmp_path: Path) -> None:
    """It keeps one of several names for the same memory, often not the one that the class ties the others to."""
    architecture = ARCHITECTURES[name]
    original = reference(folder(name), architecture)
    raw_checkpoint.write(tmp_path, folder(name), [{}])
    save_model(original, str(tmp_path / raw_checkpoint.SINGLE))
    assert len(raw_checkpoint.read(tmp_path)) < len(original.state_dict())
    same_state(load_quantized(tmp_path, "none"), original)
    usual, other = (load_quantized(path, "quark_mxfp4") for path in (folder(name), tmp_path))
    same_state(other, usual)
    assert plan_quantized(tmp_path, "quark_mxfp4").plan.memory.final_bytes == usual.load_report.final_bytes


@pytest.mark.parametrize("name", ["llama_tied", "t5"])
def test_a_cache_and_a_conversion_of_it(name: str, folder: Checkpoint, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    usual = load_quantized(folder(name), "fp8_per_channel")
    *_, (kept, path) = each_alone(name, folder, tmp_path)
    options = LoadOptions(cache=tmp_path / "cache")
    first, second = (load_quantized(path, "fp8_per_channel", options=options) for _ in range(2))
    assert (first.load_report.cache, second.load_report.cache) == ("written", "hit")
    convert_checkpoint(path, tmp_path / "out", "fp8_per_channel", format="compressed-tensors")
    assert kept[-1] in raw_checkpoint.read(tmp_path / "out")
    for model in (first, second, load_quantized(tmp_path / "out")):
        assert torch.equal(logits(model, architecture.inputs()), logits(usual, architecture.inputs()))
        assert shared(model) == shared(usual)


def test_a_reload_of_the_one_that_is_there_reaches_the_others(folder: Checkpoint, tmp_path: Path) -> None:
    *_, (kept, path) = each_alone("t5", folder, tmp_path)
    model = load_quantized(path, "quark_mxfp4")
    there: Any = model.get_parameter(kept[0])
    loader, new = there.weight_loader, torch.randn(there.shape).to(model.dtype)
    assert loader.name == kept[0]
    loader.reset()
    loader(model.shared.weight, new)
    for module in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head):
        assert torch.equal(module.weight, new)


@pytest.mark.parametrize("other", ["lm_head.weight", "decoder.embed_tokens.weight"])
def test_different_values_stay_apart_as_in_transformers_and_are_said(
    other: str, folder: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = raw_checkpoint.read(folder("t5"))
    path = raw_checkpoint.write(tmp_path / "t5", folder("t5"), [{**tensors, other: tensors["shared.weight"] + 1}])
    with caplog.at_level(logging.WARNING, "quantload"):
        got = load_quantized(path, "none")
    want = reference(path, BY_NAME["t5"])
    same_state(got, want)
    assert shared(got) == shared(want)
    assert not any(other in names for names in shared(got))
    assert got.load_report.untied == [other]
    ours = [record.getMessage() for record in caplog.records if record.name == "quantload"]
    (said,) = [message for message in ours if "different values" in message]
    assert f"{other} to shared.weight" in said
    with pytest.raises(CheckpointError, match=f"ties {other} to shared.weight, .* with different values"):
        load_quantized(path, "none", options=LoadOptions(strict=True))


def test_different_values_of_two_names_where_the_usual_one_is_missing(folder: Checkpoint, tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(folder("t5"))
    shared_weight = tensors.pop("shared.weight")
    there = {"encoder.embed_tokens.weight": shared_weight + 1, "lm_head.weight": shared_weight}
    path = raw_checkpoint.write(tmp_path / "t5", folder("t5"), [{**tensors, **there}])
    got, want = load_quantized(path, "none"), reference(path, BY_NAME["t5"])
    same_state(got, want)
    assert shared(got) == shared(want)
    (last,) = got.load_report.untied  # the class names it after the other one, which the rest is tied to
    (first,) = there.keys() - {last}
    assert torch.equal(got.get_parameter(last), there[last])
    assert torch.equal(got.shared.weight, there[first])


def test_none_of_the_names_is_an_incomplete_checkpoint(folder: Checkpoint, tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(folder("t5"))
    del tensors["shared.weight"]
    path = raw_checkpoint.write(tmp_path / "t5", folder("t5"), [tensors])
    with pytest.raises(
        MissingWeightsError, match=r"1 parameters of .* have no tensor in the checkpoint: shared\.weight"
    ):
        load_quantized(path)


def test_the_head_alone_is_not_enough_where_the_config_does_not_tie(folder: Checkpoint, tmp_path: Path) -> None:
    *_, (_, path) = each_alone("llama_tied", folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(MissingWeightsError, match=r"model\.embed_tokens\.weight"):
        load_quantized(path)


CODE = """
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    {keys}

    def __init__(self, config):
        super().__init__(config)
        {share}
        self.post_init()
"""
MODULE = "self.again = self.model.layers[0].mlp.down_proj"
PARAMETER = "self.lm_head.weight = self.model.embed_tokens.weight"
Remote = Callable[..., Path]


@pytest.fixture
def remote(folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Llama's checkpoint with some names changed, for a class of its own that shares what `share` says."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the folder of modules is put there

    def written(share: str, renamed: Mapping[str, str], keys: str = "", **config: Any) -> Path:
        tensors = {renamed.get(name, name): t for name, t in raw_checkpoint.read(folder("llama")).items()}
        tensors.pop("", None)
        path = raw_checkpoint.write(tmp_path / "own", folder("llama"), [tensors])
        (path / "modeling_own.py").write_text(CODE.format(keys=keys, share=share))
        auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        said = {"architectures": ["OwnForCausalLM"], "auto_map": auto_map, **config}
        (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **said}))
        return path

    return written


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("share", "renamed"),
    [
        (MODULE, {}),
        (MODULE, {DOWN: "again.weight"}),
        (PARAMETER, {"lm_head.weight": ""}),
        (PARAMETER, {"model.embed_tokens.weight": ""}),
    ],
    ids=["a module", "a module under its other name", "a parameter", "a parameter under its other name"],
)
def test_what_the_code_of_a_model_shares_by_itself(share: str, renamed: dict[str, str], remote: Remote) -> None:
    path = remote(share, renamed)
    stored = raw_checkpoint.read(path)
    for scheme in ("none", "fp8_per_channel"):
        model = load_quantized(path, scheme, trust_remote_code=True, options=LoadOptions(strict=True))
        if share == MODULE:
            assert model.again is model.model.layers[0].mlp.down_proj
            there = stored["again.weight" if renamed else DOWN]
            assert torch.equal(model.again.weight, there)
        else:
            assert model.lm_head.weight is model.model.embed_tokens.weight
            (there,) = (t for name, t in stored.items() if name in ("lm_head.weight", "model.embed_tokens.weight"))
            assert torch.equal(model.lm_head.weight, there)
        output = logits(model, BY_NAME["llama"].inputs())
        assert torch.isfinite(output).all()
    if share == MODULE and not renamed:
        want = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=True)
        same_state(load_quantized(path, "none", trust_remote_code=True), want)


def test_a_class_written_for_transformers_4_says_so(remote: Remote) -> None:
    """It names what is tied in a list, which transformers itself takes no more."""
    path = remote("pass", {}, keys='_tied_weights_keys = ["lm_head.weight"]', tie_word_embeddings=True)
    with pytest.raises(AttributeError, match="keys"):
        transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    with pytest.raises(UnsupportedCheckpointError, match=r"OwnForCausalLM was written for transformers 4: .*lm_head"):
        load_quantized(path, trust_remote_code=True)
