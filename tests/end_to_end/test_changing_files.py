"""Checkpoints whose files change while they are loaded or converted: nothing is made of them, and nothing is kept."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import state_bytes
from quantload import LoadOptions, convert_checkpoint, load_quantized
from quantload.cache.key import entry_key
from quantload.errors import ChangedFileError, CheckpointError, OutputError, UnsafePathError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

Change = Callable[[Path, Path], None]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
OPTIONS = LoadOptions(chunk_bytes=4096, workers=2)


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards and their index, under a time that is the same for all versions of the model."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, folder / shard, {"format": "pt"})
        os.utime(folder / shard, (1000, 1000))
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def versions(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two trainings of one model: the same names, shapes, sizes and times."""
    root = tmp_path_factory.mktemp("versions")
    tensors = load_file(golden / "bf16_qwen3moe" / "model.safetensors")
    for name, factor in (("old", 1.0), ("new", 3.0)):
        shutil.copytree(golden / "bf16_qwen3moe", root / name)
        (root / name / "model.safetensors").unlink()
        (root / name / "generation_config.json").write_text("{}")
        (root / name / "tokenizer.json").write_text(json.dumps({"version": name}))
        save(root / name, {key: tensor * factor for key, tensor in tensors.items()})
    return root / "old", root / "new"


@pytest.fixture
def model(versions: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(versions[0], tmp_path / "model"))


def replaced(*names: str) -> Change:
    """As a download or a training replaces files: each at once, under the same time."""

    def change(folder: Path, new: Path) -> None:
        for name in names:
            shutil.copy2(new / name, folder / f"{name}.tmp")
            os.replace(folder / f"{name}.tmp", folder / name)

    return change


def in_place(name: str) -> Change:
    """As `rsync --inplace --times` or `cp -p` writes a file."""

    def change(folder: Path, new: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.write((new / name).read_bytes())
        os.utime(folder / name, (1000, 1000))

    return change


def rewritten(name: str, content: str) -> Change:
    def change(folder: Path, _: Path) -> None:
        (folder / name).write_text(content)

    return change


def config_rewritten(folder: Path, _: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def truncated(folder: Path, _: Path) -> None:
    os.truncate(folder / SHARDS[1], 5000)


def removed(folder: Path, _: Path) -> None:
    (folder / SHARDS[1]).unlink()


CHANGES: dict[str, Change] = {
    "all shards replaced": replaced(*SHARDS),
    "one shard replaced": replaced(SHARDS[1]),
    "a shard written in place": in_place(SHARDS[0]),
    "a shard truncated": truncated,
    "a shard removed": removed,
    "the index replaced": replaced(INDEX),
    "the config rewritten": config_rewritten,
    "a generation config rewritten": rewritten("generation_config.json", '{"max_length": 3}'),
}


@contextlib.contextmanager
def at_read(number: int, change: Callable[[], object]) -> Iterator[list[int]]:
    """Make a change before the read of so many; the list gets the number of reads."""
    real, reads = os.preadv, [0]

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:
            reads[0] += 1
            if reads[0] == number:
                change()
        return real(fd, buffers, offset, flags)

    os.preadv = preadv
    try:
        yield reads
    finally:
        os.preadv = real


def load(folder: Path, cache: Path, scheme: str = "quark_mxfp4") -> PreTrainedModel:
    return load_quantized(
        folder, scheme, options=LoadOptions(chunk_bytes=4096, workers=2, cache=cache, page_cache="keep")
    )


def convert(folder: Path, out: Path) -> Any:
    return convert_checkpoint(folder, out, "quark_mxfp4", options=OPTIONS, max_shard_bytes=60_000)


def entries(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != "lock"] if cache.exists() else []


def moments(reads: int) -> list[int]:
    """Between the headers, in the middle of the weights, before the last of them."""
    return [3, reads // 2, reads]


@pytest.fixture(scope="module")
def reads_of_a_load(versions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> int:
    with at_read(0, lambda: None) as reads:
        load(versions[0], tmp_path_factory.mktemp("cache"))
    return reads[0]


@pytest.mark.parametrize("name", CHANGES)
def test_a_load_makes_nothing_of_files_that_change(
    name: str, versions: tuple[Path, Path], reads_of_a_load: int, tmp_path: Path
) -> None:
    assert reads_of_a_load > 20
    for number in moments(reads_of_a_load):
        folder, cache = tmp_path / f"model{number}", tmp_path / f"cache{number}"
        shutil.copytree(versions[0], folder)
        with (
            at_read(number, lambda folder=folder: CHANGES[name](folder, versions[1])),  # type: ignore[misc]
            pytest.raises(CheckpointError, match=r"changed while it was read|ended at byte|: no such file"),
        ):
            load(folder, cache)
        assert entries(cache) == []


def test_a_retry_has_the_new_weights(model: Path, versions: tuple[Path, Path], tmp_path: Path) -> None:
    with (
        at_read(12, lambda: CHANGES["all shards replaced"](model, versions[1])),
        pytest.raises(ChangedFileError, match=r"model-0000.-of-00002\.safetensors: changed while it was read"),
    ):
        load(model, tmp_path / "cache")
    again = [load(model, tmp_path / "cache") for _ in range(2)]
    assert [each.load_report.cache for each in again] == ["written", "hit"]
    new = load_quantized(versions[1], "quark_mxfp4")
    assert [state_bytes(each) for each in again] == [state_bytes(new)] * 2
    assert state_bytes(new) != state_bytes(load_quantized(versions[0], "quark_mxfp4"))


@pytest.mark.parametrize("name", ["all shards replaced", "a shard written in place"])
def test_a_shard_that_changes_between_two_passes(name: str, model: Path, versions: tuple[Path, Path]) -> None:
    """Scales of whole tensors: maxima of the old weights for codes of the new ones."""
    options = LoadOptions(chunk_bytes=4096, workers=1)
    with at_read(0, lambda: None) as reads:
        load_quantized(versions[0], "fp8_per_tensor", options=options)
    for number in (reads[0] // 2, reads[0] - 1):
        with at_read(number, lambda: CHANGES[name](model, versions[1])), pytest.raises(ChangedFileError):
            load_quantized(model, "fp8_per_tensor", options=options)
        shutil.rmtree(model)
        shutil.copytree(versions[0], model)


@pytest.mark.parametrize("verify", ["samples", "full"])
@pytest.mark.parametrize("name", ["one shard replaced", "a shard written in place"])
def test_a_shard_that_changes_before_the_key_is_made(
    name: str, verify: Any, model: Path, versions: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry would be that of the new weights, with the old ones' header."""

    def changed_entry_key(*arguments: Any) -> str:
        CHANGES[name](model, versions[1])
        return entry_key(*arguments)

    monkeypatch.setattr("quantload.cache.session.entry_key", changed_entry_key)
    with pytest.raises(ChangedFileError):
        load_quantized(model, options=LoadOptions(cache=tmp_path / "cache", cache_verify=verify))
    assert entries(tmp_path / "cache") == []


def test_a_checkpoint_that_changes_while_its_entry_is_read(
    model: Path, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    """What was cached is intact, and of a model that is no longer there."""
    cache = tmp_path / "cache"
    load(model, cache)
    before = entries(cache)
    with (
        at_read(30, lambda: CHANGES["a shard written in place"](model, versions[1])),
        pytest.raises(ChangedFileError),
    ):
        load(model, cache)
    assert entries(cache) == before


def test_an_entry_that_is_replaced_while_it_is_read_is_no_fault(model: Path, tmp_path: Path) -> None:
    """By one with the same bytes, or by a damaged one: the model is the same."""
    cache = tmp_path / "cache"
    first = load(model, cache)
    (key,) = entries(cache)

    def swap(damaged: bool) -> None:
        shutil.copytree(cache / key, cache / "copy")
        if damaged:
            os.truncate(cache / "copy" / "model.safetensors", 9000)
        (cache / key).rename(cache / "gone")
        (cache / "copy").rename(cache / key)

    for damaged in (False, True):
        with at_read(12, lambda damaged=damaged: swap(damaged)):  # type: ignore[misc]
            model_of_entry = load(model, cache)
        assert state_bytes(model_of_entry) == state_bytes(first)
        shutil.rmtree(cache / "gone")


@pytest.fixture(scope="module")
def converted(versions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    out = tmp_path_factory.mktemp("converted") / "out"
    with at_read(0, lambda: None) as reads:
        convert(versions[0], out)
    return reads[0], out


def contents(folder: Path) -> dict[str, bytes]:
    """All but the model card, which names the source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("name", [*CHANGES, "the tokenizer replaced", "the tokenizer written in place"])
def test_a_conversion_makes_nothing_of_files_that_change(
    name: str, versions: tuple[Path, Path], converted: tuple[int, Path], tmp_path: Path
) -> None:
    changes = CHANGES | {
        "the tokenizer replaced": replaced("tokenizer.json"),
        "the tokenizer written in place": in_place("tokenizer.json"),
    }
    for number in moments(converted[0]):
        folder = tmp_path / f"model{number}"
        shutil.copytree(versions[0], folder)
        with (
            at_read(number, lambda folder=folder: changes[name](folder, versions[1])),  # type: ignore[misc]
            pytest.raises(CheckpointError, match=r"changed while it was read|ended at byte|: no such file"),
        ):
            convert(folder, tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()


def test_what_was_converted_before_a_change_is_not_taken_up_after_it(
    model: Path, versions: tuple[Path, Path], converted: tuple[int, Path], tmp_path: Path
) -> None:
    """Nor after the change was taken back: finished shards are of the files whose headers the run had read."""
    reads, expected = converted
    for back in (False, True):
        with (
            at_read(reads // 2, lambda: CHANGES["a shard written in place"](model, versions[1])),
            pytest.raises(ChangedFileError),
        ):
            convert(model, tmp_path / "out")
        if back:
            in_place(SHARDS[0])(model, versions[0])
        convert(model, tmp_path / "out")
        assert (contents(tmp_path / "out") == contents(expected)) is back
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(model)
        shutil.copytree(versions[0], model)


@pytest.mark.parametrize("how", ["the folder", "a folder above it"])
def test_a_link_that_is_turned_to_another_version(how: str, versions: tuple[Path, Path], tmp_path: Path) -> None:
    """As `current` leads to the newest of several versions: the load is of the one it began with, all of it."""
    for number, version in enumerate(versions):
        (tmp_path / f"v{number}").mkdir()
        shutil.copytree(version, tmp_path / f"v{number}" / "model")
    link = tmp_path / "current"
    given, targets = (link, ("v0/model", "v1/model")) if how == "the folder" else (link / "model", ("v0", "v1"))
    link.symlink_to(targets[0])

    def turn() -> None:
        (tmp_path / "next").symlink_to(targets[1])
        os.replace(tmp_path / "next", link)

    with at_read(12, turn):
        loaded = load(given, tmp_path / "cache")
    assert os.readlink(link) == targets[1]
    assert state_bytes(loaded) == state_bytes(load_quantized(versions[0], "quark_mxfp4"))
    assert state_bytes(load(given, tmp_path / "cache")) == state_bytes(load_quantized(versions[1], "quark_mxfp4"))


def test_a_snapshot_of_the_hub_whose_links_are_turned(versions: tuple[Path, Path], tmp_path: Path) -> None:
    """Files of a snapshot are links to blobs beside it."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for version in versions:
        for path in version.iterdir():
            shutil.copy2(path, blobs / f"{version.name}-{path.name}")
    for path in versions[0].iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/old-{path.name}")
    assert state_bytes(load_quantized(snapshot)) == state_bytes(load_quantized(versions[0]))

    def turn() -> None:
        (snapshot / "next").symlink_to(f"../../blobs/new-{SHARDS[0]}")
        os.replace(snapshot / "next", snapshot / SHARDS[0])

    with at_read(12, turn), pytest.raises(ChangedFileError, match="another file is in its place"):
        load(snapshot, tmp_path / "cache")


def test_a_conversion_into_its_own_source(model: Path, tmp_path: Path, converted: tuple[int, Path]) -> None:
    """A folder in the model's own is one like any other; the model's own is refused, by whatever path."""
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()}
    (tmp_path / "link").symlink_to("model")
    for out in (model, tmp_path / "link", model / ".." / "model"):
        with pytest.raises(OutputError, match="exists; give a folder that does not"):
            convert(model, out)
    convert(model, model / "quantized")
    assert contents(model / "quantized") == contents(converted[1])
    shutil.rmtree(model / "quantized")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()} == before


def test_small_files_that_lead_out_are_refused_before_a_weight_is_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (model / "extra.json").symlink_to(tmp_path / "secret.json")
    progress: list[int] = []
    with pytest.raises(UnsafePathError, match=r"extra\.json is a link to .*secret\.json, outside the checkpoint"):
        convert_checkpoint(model, tmp_path / "out", "quark_mxfp4", progress=lambda done, _: progress.append(done))
    assert progress == []
    assert sorted(os.listdir(tmp_path)) == ["model", "secret.json"]
