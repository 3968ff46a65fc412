"""Whatever is given instead of a folder with safetensors weights is told what it is, and what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from quantload.checkpoint import read_index
from quantload.checkpoint.resolve import resolve
from quantload.errors import CheckpointError, MissingShardError, QuantloadError, UnsupportedCheckpointError
from shard_files import shard_bytes

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
SHARD = shard_bytes({"a": b"1"})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "'Qwen/Qwen3-0.6B'"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/", "'Qwen/Qwen3-0.6B'"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "'Qwen/Qwen3-0.6B'"),
        ("http://hf.co/Qwen/Qwen3-0.6B?library=transformers#x", "'Qwen/Qwen3-0.6B'"),
        ("huggingface.co/Qwen/Qwen3-0.6B", "'Qwen/Qwen3-0.6B'"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/refs", "'Qwen/Qwen3-0.6B' with --revision refs"),
        ("https://huggingface.co/a/b/blob/0a1b2c/model.safetensors", "'a/b' with --revision 0a1b2c"),
        ("https://huggingface.co/a/b/resolve/main/model.safetensors", "'a/b'"),
        ("https://huggingface.co/datasets/a/b", "no address of a model"),
        ("https://huggingface.co/gpt2", "no address of a model"),
        ("Qwen/Qwen3-0.6B@v1.0", "'Qwen/Qwen3-0.6B' with --revision v1.0"),
        ("Qwen/Qwen3-0.6B@refs/pr/1", "'Qwen/Qwen3-0.6B' with --revision refs/pr/1"),
    ],
)
def test_addresses_of_the_hub_are_told_the_hub_id(given: str, wanted: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        resolve(given)
    assert wanted in str(raised.value)
    assert ("--revision" in str(raised.value)) == ("--revision" in wanted)


def test_a_folder_with_an_at_in_its_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b@c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("a/b@c").root == tmp_path / "a" / "b@c"


def archive(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "GGUF, which llama.cpp reads; give the checkpoint it was made from"),
        ("model", b"GGUF\3\0\0\0", "GGUF, which llama.cpp reads"),
        ("pytorch_model.bin", b"PK\3\4", "which can run code when opened; convert them once with transformers"),
        ("consolidated.00.pth", pickle.dumps(1), "which can run code when opened"),
        ("model.pt", b"PK\3\4", "which can run code"),
        ("model.onnx", b"\x08\x07", "a file of ONNX; give the checkpoint"),
        ("weights.npz", b"PK\3\4", "NumPy or MLX"),
        ("model.safetensors", SHARD, "is a file; give the folder it lies in, with its config.json: "),
        ("model.safetensors", LFS, "Git LFS pointer"),
        ("config.json", b"{}", "is a file; give the folder it lies in: "),
    ],
)
def test_a_file_is_told_what_it_is(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedCheckpointError)) as raised:
        resolve(tmp_path / name)
    assert says in str(raised.value)
    if says.endswith(": "):
        assert str(tmp_path) in str(raised.value)


FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, "is empty"),
    "gguf": ({"model-q4.gguf": b"GGUF"}, "only has GGUF, which llama.cpp reads (model-q4.gguf)"),
    "gguf with a config": ({"config.json": b"{}", "model-q4.gguf": b"GGUF"}, "only has GGUF"),
    "pickles": ({"config.json": b"{}", "pytorch_model.bin": b"PK"}, "can run code when opened"),
    "onnx": ({"config.json": b"{}", "model.onnx": b""}, "only has ONNX (model.onnx)"),
    "flax": ({"config.json": b"{}", "flax_model.msgpack": b""}, "only has Flax weights"),
    "tensorflow": ({"config.json": b"{}", "tf_model.h5": b""}, "only has TensorFlow weights"),
    "adapter": ({"adapter_config.json": b"{}", "adapter_model.safetensors": SHARD}, "merge it into its base model"),
    "old adapter": ({"adapter_config.json": b"{}", "adapter_model.bin": b"PK"}, "merge it into its base model"),
    "diffusers": ({"model_index.json": b"{}", "unet/config.json": b"{}"}, "is a pipeline of diffusers"),
    "no config": ({"model.safetensors": SHARD}, "has weights (model.safetensors) but no config.json"),
    "no index": ({"config.json": b"{}", "model-00001-of-00002.safetensors": SHARD}, "restore the missing"),
    "a tokenizer": ({"tokenizer.json": b"{}"}, "has no config.json; give the folder or hub id"),
    "only a config": ({"config.json": b"{}"}, "neither model.safetensors nor"),
    "a level too high": ({"llama/config.json": b"{}", "notes.txt": b""}, "/llama"),
    "a hub cache": ({"refs/main": b"0a1b", "snapshots/0a1b/config.json": b"{}"}, "/snapshots/0a1b"),
    "a download": ({"config.json": b"{}", ".cache/huggingface/download/x.incomplete": b""}, "is not finished"),
    "a conversion": ({"journal.jsonl": b"", "files/config.json": b"{}"}, "run quantload convert again"),
    "a cache entry": ({"entry.json": b"{}", "checksums.crc32": b""}, "give the checkpoint, and the cache with --cache"),
}


@pytest.fixture
def filled(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    def fill(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return fill


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_told_what_it_is(kind: str, filled: Callable[[dict[str, bytes]], Path]) -> None:
    files, says = FOLDERS[kind]
    checkpoint = resolve(filled(files))
    look = (lambda: read_index(checkpoint)) if "config.json" in files else checkpoint.config
    with pytest.raises((CheckpointError, UnsupportedCheckpointError)) as raised:
        look()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS, "is a Git LFS pointer, .*'git lfs pull'"),
        (b"GGUF\3\0\0\0\0\0\0\0", "is a GGUF file"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (pickle.dumps({"a": 1}, protocol=2) + bytes(8), "is a pickle"),
    ],
)
def test_a_shard_that_is_another_kind_of_file(
    content: bytes, says: str, filled: Callable[[dict[str, bytes]], Path]
) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_index(resolve(filled({"config.json": b"{}", "model.safetensors": content})))


def test_an_archive_of_torch_with_the_name_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    archive(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="zip archive, as torch"):
        read_index(resolve(tmp_path))


def test_a_download_that_is_not_finished_is_named_beside_the_shard_it_lacks(
    filled: Callable[[dict[str, bytes]], Path],
) -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.dumps({"weight_map": dict(zip("abc", names, strict=True))}).encode()
    root = filled({"config.json": b"{}", "model.safetensors.index.json": index, names[0]: SHARD})
    with pytest.raises(MissingShardError, match=r"2 of 3 shards are missing\)$"):
        read_index(resolve(root))
    filled({f"{names[1]}.part": b""})
    with pytest.raises(MissingShardError, match=rf"not finished \({names[1]}\.part\): run it again"):
        read_index(resolve(root))


def said_by(config: Mapping[str, object]) -> str:
    from quantload.schemes.stored.read import read_stored

    with pytest.raises(QuantloadError) as raised:
        read_stored(config, {}, lambda entry: torch.zeros(1))
    assert isinstance(raised.value, UnsupportedCheckpointError)
    return str(raised.value)


def test_quantized_checkpoints_of_tools_that_are_not_read_are_named() -> None:
    assert "as MLX writes it" in said_by({"quantization": {"group_size": 64, "bits": 4}})
    both = {"quantization": {"bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}
    assert "as MLX writes it" in said_by(both)
    assert "NF4, FP4" in said_by({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    assert "beside fields of bitsandbytes" in said_by({"quantization_config": {"load_in_8bit": True}})
