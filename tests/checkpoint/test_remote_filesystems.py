"""Files of any file system that fsspec knows: those of its own, in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from quantload.checkpoint.remote.client import ChangedError, MissingError, PassingError, RefusedError
from quantload.checkpoint.remote.filesystems import FilesystemClient, known_schemes
from quantload.checkpoint.remote.requests import Requests, nothing_stops
from quantload.checkpoint.resolve import resolve
from quantload.errors import ChangedFileError, UnsupportedCheckpointError

fsspec = pytest.importorskip("fsspec")
CONTENT = bytes(range(256)) * 400


@pytest.fixture
def client() -> Iterator[FilesystemClient]:
    files = fsspec.filesystem("memory")
    files.pipe_file("/model/a", CONTENT)
    files.pipe_file("/model/empty", b"")
    yield FilesystemClient("memory://model", "memory://model")
    files.store.clear()


def get(client: FilesystemClient, name: str = "a", start: int = 0, stop: int = 1 << 20) -> bytes:
    return b"".join(client.get(name, start, stop, None).chunks)


def test_ranges_and_names(client: FilesystemClient) -> None:
    assert get(client, "a", 1000, 60_000) == CONTENT[1000:60_000]
    assert get(client, "a", 5, 1 << 30) == CONTENT[5:]
    assert get(client, "empty") == b""
    assert sorted(client.names() or ()) == ["a", "empty"]
    assert client.get("a", 0, 1, None).tag.size == len(CONTENT)
    with pytest.raises(MissingError):
        get(client, "gone")


def test_a_file_that_is_written_anew_has_changed(client: FilesystemClient) -> None:
    requests = Requests(client)
    requests.note("a", nothing_stops)
    client._files.pipe_file("/model/a", CONTENT[::-1])
    with pytest.raises(ChangedFileError):
        requests.note("a", nothing_stops)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("hunter2"), RefusedError),
        (TimeoutError(), PassingError),
        (ConnectionResetError("token=hunter2"), PassingError),
        (RuntimeError("https://host/?sig=hunter2"), RefusedError),
    ],
)
def test_errors(client: FilesystemClient, error: Exception, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(client._files, "cat_file", fails)
    with pytest.raises(kind) as caught:
        get(client)
    assert "hunter2" not in str(caught.value)
    assert not isinstance(caught.value, ChangedError)


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"sftp://host/model: .*sftp:// is read through fsspec"):
        resolve("sftp://me:hunter2@host/model")


def test_local_files_are_no_scheme_of_their_own() -> None:
    assert "memory" in known_schemes()
    assert "file" not in known_schemes()
