from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from quantload.checkpoint.resolve import resolve
from quantload.errors import CheckpointError, QuantloadError
from shard_files import shard_bytes

RESPONSE: Any = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid/model"))


class Hub:
    """A stand-in for the hub: files of one repository, and the patterns each download asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, bytes] = {"config.json": b"{}"}
        self.asked: list[tuple[str | None, list[str]]] = []
        self.error: Exception | None = None

    def download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((revision, allow_patterns))
        if self.error is not None:
            raise self.error
        root = self.folder / "snapshots" / "0123abc"
        root.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (root / name).write_bytes(content)
        return str(root)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    module = sys.modules[resolve.__module__]
    stand_in = Hub(tmp_path)
    monkeypatch.setattr(module, "snapshot_download", stand_in.download)
    return stand_in


def test_folder(tmp_path: Path) -> None:
    assert resolve(tmp_path).root == tmp_path
    assert resolve(str(tmp_path)).model_id == str(tmp_path)


def test_a_revision_of_a_folder_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolve(tmp_path)
    assert caplog.messages == []
    assert resolve(tmp_path, "main").root == tmp_path
    assert caplog.messages == [f"{tmp_path} is a folder, which has no revisions: 'main' is not looked at"]


@pytest.mark.parametrize("given", ["./nothing", "/no/such/folder", "~/no-such-folder", "../no", "a/b/c", "a\\b", "x/"])
def test_missing_folder_is_no_hub_id(given: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no folder here"):
        resolve(given)
    assert hub.asked == []


def test_nothing_is_not_the_current_folder() -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        resolve("")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(tmp_path / "model.safetensors")


def test_only_the_needed_shards_are_downloaded(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.files |= {
        "model.safetensors.index.json": index,
        "model-1.safetensors": shard_bytes({"a": b"1"}),
        "consolidated.safetensors": b"",
        "pytorch_model.bin": b"",
        "tokenizer.json": b"{}",
    }
    root = resolve("owner/name", revision="v1").root
    assert sorted(path.name for path in root.iterdir()) == [
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert [revision for revision, _ in hub.asked] == ["v1", "0123abc"]
    resolve("owner/name", revision="v1")
    assert len(hub.asked) == 3, "what is there is not asked for again"


@pytest.mark.parametrize("online", [True, False])
def test_a_repository_without_a_model_is_told_what_its_files_are(
    online: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(api: object, repo: str, *, revision: str) -> list[str]:
        if not online:
            raise httpx.ConnectError("no route")
        return [*hub.files, "folder/other.onnx"]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    hub.files = {"model-q4.gguf": b"GGUF", "README.md": b""}
    with pytest.raises(QuantloadError, match="GGUF" if online else r"'owner/name' has no config\.json"):
        resolve("owner/name")
    hub.files["config.json"] = b"{}"
    with pytest.raises(QuantloadError, match="GGUF" if online else "no weights in safetensors"):
        resolve("owner/name")
    hub.files["adapter_config.json"] = b"{}"
    with pytest.raises(QuantloadError, match="'owner/name' holds an adapter"):
        resolve("owner/name")


def test_single_file_is_downloaded_when_there_is_no_index(hub: Hub) -> None:
    hub.files["model.safetensors"] = shard_bytes({"a": b"1"})
    assert (resolve("gpt2").root / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RepositoryNotFoundError("x", response=RESPONSE), "neither a folder here nor a repository"),
        (GatedRepoError("x", response=RESPONSE), "accept its licence"),
        (RevisionNotFoundError("x", response=RESPONSE), "no revision 'v9'"),
        (LocalEntryNotFoundError("x"), "hub cannot be reached"),
        (OSError("no route"), "could not be downloaded: no route"),
        (httpx.ConnectError("no route"), "could not be downloaded: no route"),
    ],
)
def test_hub_errors_say_what_to_do(hub: Hub, error: Exception, says: str) -> None:
    hub.error = error
    with pytest.raises(CheckpointError, match=says):
        resolve("owner/name", revision="v9")


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="give a folder"):
        resolve("quantload-tests/does-not-exist")


def test_invalid_hub_id() -> None:
    with pytest.raises(CheckpointError, match="valid hub id"):
        resolve("what is this?")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no config.json"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_broken_config(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        resolve(tmp_path).config()


def test_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert resolve(tmp_path).config() == {"model_type": "llama"}


@pytest.mark.parametrize("said", [["awq"], "awq", 4])
def test_a_quantization_config_that_is_no_object(said: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(CheckpointError, match=f"quantization_config is a {type(said).__name__}, expected"):
        resolve(tmp_path).config()
