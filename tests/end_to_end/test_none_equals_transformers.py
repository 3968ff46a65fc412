"""Loading without quantization gives exactly the model transformers' own `from_pretrained` gives."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import raw_checkpoint
import torch
import transformers
from architectures import ALL, BY_NAME, FAILS_IN_TRANSFORMERS, Architecture, generate, logits, reference, save
from quantload import load_quantized
from torch import Tensor

Checkpoint = Callable[[str], Path]


def assert_same_bytes(loaded: Iterable[tuple[str, Tensor]], wanted: Iterable[tuple[str, Tensor]]) -> None:
    got, want = dict(loaded), dict(wanted)
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert not got[name].is_meta, name
        same = got[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(*same), name


def storage_groups(tensors: dict[str, Tensor]) -> set[frozenset[str]]:
    """Names that share their memory, as tied weights do."""
    groups: dict[int, set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        if tensor.numel():
            groups[tensor.data_ptr()].add(name)
    return {frozenset(names) for names in groups.values()}


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)
def test_none_equals_from_pretrained(architecture: Architecture, checkpoint: Checkpoint) -> None:
    path = checkpoint(architecture.name)
    want = reference(path, architecture)
    got = load_quantized(str(path), "none")

    assert type(got) is type(want)
    assert_same_bytes(got.state_dict().items(), want.state_dict().items())
    assert_same_bytes(got.named_buffers(), want.named_buffers())
    assert storage_groups(got.state_dict(keep_vars=True)) == storage_groups(want.state_dict(keep_vars=True))
    assert not any(module.training for module in got.modules())
    assert got.dtype == want.dtype
    assert got.config.to_dict() == want.config.to_dict()
    inputs = architecture.inputs()
    assert torch.equal(logits(got, inputs), logits(want, inputs))
    if architecture.generates:
        assert got.generation_config.to_dict() == want.generation_config.to_dict()
        assert torch.equal(generate(got, inputs, 4), generate(want, inputs, 4))


@pytest.mark.parametrize(
    "architecture", [a for a in ALL if a.class_name in FAILS_IN_TRANSFORMERS], ids=lambda a: a.name
)
def test_a_forward_that_the_other_tests_go_around_does_fail(architecture: Architecture, checkpoint: Checkpoint) -> None:
    if FAILS_IN_TRANSFORMERS[architecture.class_name] != transformers.__version__:
        pytest.skip("the tests run the whole model with this transformers")
    with pytest.raises(AttributeError, match="has no attribute 'image_outputs'"):
        reference(checkpoint(architecture.name), architecture)(**architecture.inputs())


def test_report_of_an_unquantized_load(checkpoint: Checkpoint) -> None:
    report = load_quantized(checkpoint("qwen3_moe"), "none").load_report.to_dict()
    assert report["quantization"] == "none"
    assert report["layers"] == []
    tensors = raw_checkpoint.read(checkpoint("qwen3_moe"))
    assert report["final_bytes"] >= sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["bert", "gpt_oss", "nomic_bert"])
def test_shards_equal_one_file(name: str, tmp_path: Path) -> None:
    architecture = BY_NAME[name]
    save(architecture, tmp_path, max_shard_size="60KB")
    assert (tmp_path / raw_checkpoint.INDEX).exists()
    want = reference(tmp_path, architecture)
    assert_same_bytes(load_quantized(tmp_path, "none").state_dict().items(), want.state_dict().items())


def test_names_of_old_checkpoints_are_understood(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`LayerNorm.gamma` and `.beta` are what BERT's first checkpoints call its norms' weight and bias."""
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in raw_checkpoint.read(checkpoint("bert")).items()
    }
    assert any(name.endswith("gamma") for name in tensors)
    path = raw_checkpoint.write(tmp_path / "old", checkpoint("bert"), [tensors])
    want = reference(checkpoint("bert"), BY_NAME["bert"])
    assert_same_bytes(load_quantized(path, "none").state_dict().items(), want.state_dict().items())


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
        ("llama_tied", "lm_head.weight"),
    ],
)
def test_tensors_that_transformers_ignores_are_no_error(
    name: str, extra: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tensors = raw_checkpoint.read(checkpoint(name))
    assert extra not in tensors
    # A tied head that is also stored holds the embedding's values.
    tensors[extra] = tensors["model.embed_tokens.weight"] if extra == "lm_head.weight" else torch.ones(32, 4)
    path = raw_checkpoint.write(tmp_path / "extra", checkpoint(name), [tensors])
    want = reference(path, BY_NAME[name])
    got = load_quantized(path, "none")
    assert_same_bytes(got.state_dict().items(), want.state_dict().items())
    assert storage_groups(got.state_dict(keep_vars=True)) == storage_groups(want.state_dict(keep_vars=True))


def _norms_in_float32(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.float() for name, tensor in tensors.items() if "norm" in name})


def _config_without_dtype(folder: Path, tensors: dict[str, Tensor]) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


def _weights_wider_than_the_config_says(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.float() for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize(
    "change",
    [
        (_norms_in_float32,),
        (_config_without_dtype,),
        (_weights_wider_than_the_config_says,),
        (_config_without_dtype, _weights_wider_than_the_config_says),
    ],
    ids=lambda change: " and ".join(part.__name__.strip("_") for part in change),
)
def test_dtype_is_chosen_as_transformers_does(
    name: str, change: tuple[Callable[[Path, dict[str, Tensor]], None], ...], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(checkpoint(name), tmp_path / "changed"))
    tensors = raw_checkpoint.read(path)
    for part in change:
        part(path, tensors)
    raw_checkpoint.write_shard(path / raw_checkpoint.SINGLE, tensors)
    want = reference(path, BY_NAME[name])
    got = load_quantized(path, "none")
    assert got.dtype == want.dtype
    assert_same_bytes(got.state_dict().items(), want.state_dict().items())
    inputs = BY_NAME[name].inputs()
    assert torch.equal(logits(got, inputs), logits(want, inputs))
    # Quantized, it computes in the same dtype, and what is kept is the same.
    quantized = load_quantized(path, "quark_mxfp4")
    assert logits(quantized, inputs).dtype == logits(want, inputs).dtype
    norm = next(key for key in want.state_dict() if "norm" in key or "ln_f" in key)
    assert_same_bytes([(norm, quantized.state_dict()[norm])], [(norm, want.state_dict()[norm])])


def test_base_model_checkpoint_names_take_the_prefix(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint of the bare `LlamaModel`, whose names have no `model.` in front, and a head besides."""
    tensors = {name.removeprefix("model."): t for name, t in raw_checkpoint.read(checkpoint("llama_tied")).items()}
    path = raw_checkpoint.write(tmp_path / "base", checkpoint("llama_tied"), [tensors])
    want = reference(checkpoint("llama_tied"), BY_NAME["llama_tied"])
    assert_same_bytes(load_quantized(path, "none").state_dict().items(), want.state_dict().items())
