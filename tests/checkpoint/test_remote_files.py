"""The small files of a remote checkpoint: which are fetched, when, and that nothing of them stays."""

from __future__ import annotations

import gc
import json

import pytest
from memory_client import MemoryClient
from quantload.checkpoint import Checkpoint
from quantload.checkpoint.remote import requests as requests_module
from quantload.checkpoint.remote.client import MissingError, PassingError, RefusedError, RemoteError
from quantload.checkpoint.remote.files import RemoteFiles
from quantload.errors import CheckpointError, UnsafePathError

CONFIG = {"auto_map": {"AutoModel": "modeling_x.Model", "AutoTokenizer": ["tok.Slow", None], "AutoConfig": "a/b--c.D"}}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "modeling_x.py": b"from .parts import A, B\nfrom . import more, other as o\nfrom torch import nn\n",
    **dict.fromkeys(("parts.py", "more.py", "other.py", "tok.py", "unused.py"), b""),
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "model.safetensors": b"weights",
}


class Unlisted(MemoryClient):
    def names(self) -> None:
        return None


def gathered(files: RemoteFiles) -> set[str]:
    return {str(path.relative_to(files.root)) for path in files.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [MemoryClient, Unlisted])
def test_files_are_fetched_when_they_are_needed(kind: type[MemoryClient]) -> None:
    client = kind(FILES)
    files = RemoteFiles(client)
    files.gather(("config.json",))
    assert gathered(files) == {"config.json"}
    checkpoint = Checkpoint(files.root, files.shown, files)
    checkpoint.note_code()
    code = {"modeling_x.py", "parts.py", "more.py", "other.py", "tok.py"}
    assert gathered(files) - {"unused.py"} == {"config.json", *code}
    checkpoint.note_small_files()
    assert gathered(files) - {"unused.py"} == {"config.json", "tokenizer.json", "1_Pooling/config.json", *code}
    asked = len(client.asked)
    checkpoint.note_small_files()
    assert len(client.asked) == asked, "once"
    root = files.root
    files.close()
    assert not root.exists()


def test_the_folder_goes_with_the_checkpoint() -> None:
    files = RemoteFiles(MemoryClient(FILES))
    root = files.root
    del files
    gc.collect()
    assert not root.exists()


def test_no_folder_is_left_for_what_is_missing() -> None:
    files = RemoteFiles(Unlisted({"config.json": b"{}"}))
    files.gather(("*.json",))
    assert [path.name for path in files.root.iterdir()] == ["config.json"]
    files.close()


def test_names_that_lead_out_of_the_folder_are_refused() -> None:
    files = RemoteFiles(MemoryClient({"../evil.json": b"{}"}))
    with pytest.raises(UnsafePathError):
        files.gather(("*.json",))
    files.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MissingError("HTTP 404, NoSuchBucket"), r"test://files: no such folder \(HTTP 404, NoSuchBucket\)"),
        (PassingError("throttled", "HTTP 503"), "test://files cannot be read after 3 tries: HTTP 503"),
        (RefusedError("HTTP 400, ExpiredToken"), "test://files cannot be read: HTTP 400, ExpiredToken; log in"),
    ],
)
def test_a_server_that_does_not_say_which_files_it_has(
    error: RemoteError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(requests_module, "RETRIES", 2)

    class Failing(MemoryClient):
        def names(self) -> list[str] | None:
            raise error

    files = RemoteFiles(Failing(FILES))
    with pytest.raises(CheckpointError, match=said):
        files.gather(("*.json",))
    files.close()


LOST = {"config.json": b"{}", "model-1.safetensors": b"", "model-2.safetensors": b""}


@pytest.mark.parametrize(
    ("kind", "present", "has_config", "said"),
    [
        (MemoryClient, LOST, True, r"but model-1.safetensors, .* restore the missing model.safetensors.index.json"),
        (Unlisted, LOST, True, r"test://files has a config\.json, but neither .* nor .*index\.json; restore the one"),
        (MemoryClient, {"config.json": b""}, True, r"has a config\.json, but neither .* nor .*, nor other weights"),
        (MemoryClient, {"a/config.json": b"", "a/model.safetensors": b""}, False, "the model: test://files/a$"),
        (MemoryClient, {}, False, r"has no config\.json; give the address of the folder that has the config\.json"),
        (Unlisted, {}, False, r"has no config\.json; give the address of the folder that has the config\.json"),
    ],
)
def test_what_a_folder_lacks_is_said(
    kind: type[MemoryClient], present: dict[str, bytes], has_config: bool, said: str
) -> None:
    files = RemoteFiles(kind(present))
    files.gather(("*.json",))
    with pytest.raises(CheckpointError, match=said):
        raise files.no_model(has_config=has_config)
    files.close()


def test_a_small_file_must_be_small() -> None:
    files = RemoteFiles(MemoryClient({"generation_config.json": b" " * ((1 << 20) + 1)}))
    with pytest.raises(CheckpointError, match="1,048,577 bytes, such a file may have 1,048,576"):
        files.gather(("*.json",))
    files.close()
