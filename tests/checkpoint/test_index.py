from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from quantload.checkpoint import Checkpoint, read_index
from quantload.checkpoint.resolve import resolve
from quantload.errors import (
    CheckpointError,
    CorruptHeaderError,
    MissingShardError,
    TruncatedShardError,
    UnsafePathError,
    UnsupportedCheckpointError,
)
from shard_files import MemorySource, shard_bytes, write_sharded

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
THREE = "overlay.safetensors"


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_bytes({"a": b"123", "b": b"45"}, {"format": "pt"}))
    index = read_index(resolve(tmp_path))
    assert [shard.path for shard in index.shards] == ["model.safetensors"]
    assert index.shards[0].size == (tmp_path / "model.safetensors").stat().st_size
    assert index.total_bytes == 5
    assert index.metadata == {"format": "pt"}


def test_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, {TWO: {"c": b"1"}, ONE: {"a": b"123", "b": b"45"}})
    index = read_index(resolve(tmp_path))
    assert [shard.path for shard in index.shards] == [ONE, TWO]
    assert {name: entry.shard for name, entry in index.tensors.items()} == {"a": 0, "b": 0, "c": 1}


def test_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": b"1"}})
    (tmp_path / "model.safetensors").write_bytes(shard_bytes({"b": b"2"}))
    assert set(read_index(resolve(tmp_path)).tensors) == {"b"}


def test_shards_decide_where_a_tensor_lies_as_in_transformers(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": b"1"}, TWO: {"b": b"2", "unlisted": b"3"}}, {"a": TWO, "b": ONE})
    index = read_index(resolve(tmp_path))
    assert {name: entry.shard for name, entry in index.tensors.items()} == {"a": 0, "b": 1, "unlisted": 1}


def test_unlisted_files_are_left_alone(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": b"1"}})
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even a shard")
    assert set(read_index(resolve(tmp_path)).tensors) == {"a"}


def test_transformers_weights_in_the_config_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    (tmp_path / "other.safetensors").write_bytes(shard_bytes({"a": b"1"}))
    assert read_index(resolve(tmp_path)).shards[0].path == "other.safetensors"
    (tmp_path / "config.json").write_text('{"transformers_weights": "../other.safetensors"}')
    with pytest.raises(UnsafePathError):
        read_index(resolve(tmp_path))


def test_index_naming_a_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": b"1"}}, {"a": ONE, "b": TWO})
    with pytest.raises(MissingShardError, match=f"index.json names the shard {TWO}"):
        read_index(resolve(tmp_path))


def test_tensor_listed_but_nowhere(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": b"1"}}, {"a": ONE, **{f"lost.{i}": ONE for i in range(9)}})
    with pytest.raises(CheckpointError, match=r"lists lost\.0, .*lost\.4 and 4 more"):
        read_index(resolve(tmp_path))


@pytest.mark.parametrize(
    "listed",
    [{"c": ONE, "b": TWO}, {"a": THREE, "c": ONE, "b": TWO}],
    ids=["nothing", "a shard without it"],
)
def test_tensor_in_two_shards_of_which_the_index_names_none(tmp_path: Path, listed: dict[str, str]) -> None:
    shards = {ONE: {"a": b"1", "c": b"3"}, TWO: {"a": b"2", "b": b"4"}, THREE: {"d": b"5"}}
    write_sharded(tmp_path, shards, listed)
    with pytest.raises(CheckpointError, match=f"a in {ONE} and again in {TWO}"):
        read_index(resolve(tmp_path))


@pytest.mark.parametrize("counts", [ONE, TWO, THREE])
def test_of_a_tensor_in_several_shards_the_one_counts_that_the_index_names(tmp_path: Path, counts: str) -> None:
    shards = {ONE: {"a": b"1", "b": b"4"}, TWO: {"a": b"22", "c": b"5"}, THREE: {"a": b"333", "d": b"6"}}
    write_sharded(tmp_path, shards, {"a": counts, "b": ONE, "c": TWO, "d": THREE})
    index = read_index(resolve(tmp_path))
    assert index.tensors["a"].nbytes == len(shards[counts]["a"])
    assert index.shards[index.tensors["a"].shard].path == counts
    assert index.overlaid == ("a",)
    assert index.total_bytes == sum(entry.nbytes for entry in index.tensors.values())


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "x/../../y.safetensors", "C:\\x", "..\\x", "", "a\0b"]
)
def test_index_naming_a_path_outside(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"weight_map": {"a": name}})
    with pytest.raises(UnsafePathError, match="inside its own folder"):
        read_index(resolve(tmp_path))


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    outside.write_bytes(shard_bytes({"a": b"1"}))
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="outside the checkpoint folder"):
        read_index(resolve(folder))


def test_links_of_the_hub_cache_work(tmp_path: Path) -> None:
    repo = tmp_path / "models--owner--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_bytes(shard_bytes({"a": b"1"}))
    (snapshot / "model.safetensors").symlink_to(os.path.join("..", "..", "blobs", "123"))
    assert set(read_index(resolve(snapshot)).tensors) == {"a"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "a JSON object"),
        ("[]", "a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": 5}', "a JSON object"),
        ('{"weight_map": {"a": 5}}', "both in double quotes"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        ('{"metadata": ' + "[" * 100_000 + "}", "a JSON value"),
        ('{"metadata": ["' + "x" * 2_000_000 + '"]}', "at most 1 MiB"),
        ('{"weight_map": {"a": "x.safetensors"}} 1', "nothing more"),
    ],
)
def test_broken_index(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=says):
        read_index(resolve(tmp_path))


@pytest.mark.parametrize("junk", [b'"\xac"', b'[1, "a\xca"]', b'{"\xff": 1}'])
def test_bytes_that_are_no_text_are_not_skipped(tmp_path: Path, junk: bytes) -> None:
    content = b'{"metadata": ' + junk + b', "weight_map": {"a": "x.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="in UTF-8 at byte 13"):
        read_index(resolve(tmp_path))


def test_metadata_of_any_kind_is_skipped(tmp_path: Path) -> None:
    (tmp_path / ONE).write_bytes(shard_bytes({"a": b"1"}))
    text = '{"metadata": {"é": [1, {"}": null}]}, "weight_map": {"a": "' + ONE + '"}, "x": 1e5}'
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    assert set(read_index(resolve(tmp_path)).tensors) == {"a"}


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ([], CheckpointError, "neither model.safetensors nor"),
        (["pytorch_model.bin"], UnsupportedCheckpointError, "save_pretrained"),
        (["consolidated.00.pth", "pytorch_model.bin.index.json"], UnsupportedCheckpointError, "pickle"),
        (["model-00001-of-00002.safetensors"], CheckpointError, "restore the missing model.safetensors.index.json"),
        (["model.gguf"], UnsupportedCheckpointError, "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedCheckpointError, "merge it"),
    ],
)
def test_nothing_to_load(tmp_path: Path, files: list[str], error: type[Exception], says: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(error, match=says):
        read_index(resolve(tmp_path))


def test_index_naming_pickles(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": {"a": "pytorch_model-00001.bin"}})
    with pytest.raises(UnsupportedCheckpointError, match=r"only \.safetensors"):
        read_index(resolve(tmp_path))


def test_bad_shards_are_found_before_loading(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = shard_bytes({"a": bytes(1000)})
    path.write_bytes(whole[:-1])
    with pytest.raises(TruncatedShardError, match="1 bytes are missing"):
        read_index(resolve(tmp_path))
    path.write_bytes(whole[:8] + b"x" + whole[9:])
    with pytest.raises(CorruptHeaderError):
        read_index(resolve(tmp_path))
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_index(resolve(tmp_path))


def test_any_source_serves_the_index(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": ONE}}).encode()
    source = MemorySource({"model.safetensors.index.json": index, ONE: shard_bytes({"a": b"123"})})
    assert read_index(Checkpoint(tmp_path, "s3://bucket/model"), source).total_bytes == 3
