"""Files that are replaced, written to or removed while they are read are noticed, whatever their times say."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantload.checkpoint.identity import FileIdentities
from quantload.checkpoint.source import FileSource
from quantload.errors import ChangedFileError, CheckpointError

CONTENT = bytes(range(200))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "shard"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    os.utime(path, (1000, 1000))
    return path


def replace(path: Path) -> None:
    """By a file of the same size and times, as a second snapshot of a model has them."""
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").replace(path)


def write_in_place(path: Path) -> None:
    """And set the time back, as `rsync --inplace --times` does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def grow(path: Path) -> None:
    os.truncate(path, 300)


def remove(path: Path) -> None:
    path.unlink()


def remove_the_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def turn_the_folder(path: Path) -> None:
    """Another version of it, as a link to the newest snapshot leads to."""
    path.parent.rename(path.parent.with_name("old"))
    shutil.copytree(path.parent.with_name("old"), path.parent.with_name("new"))
    path.parent.symlink_to("new")


def turn_a_link(path: Path) -> None:
    path.rename(path.with_name("blob"))
    path.symlink_to("blob")
    shutil.copy2(path.with_name("blob"), path.with_name("blob2"))


CHANGES = [replace, write_in_place, truncate, grow, remove, remove_the_folder, turn_the_folder]
SAID: dict[Callable[[Path], None], str] = {
    replace: "another file is in its place",
    write_in_place: "it was written to, or",
    truncate: "200 bytes before, 100 now",
    grow: "200 bytes before, 300 now",
    remove: "it is no longer there",
    remove_the_folder: "it is no longer there",
    turn_the_folder: "another file is in its place",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_in_the_end(file: Path, change: Callable[[Path], None]) -> None:
    identities = FileIdentities(file.parent)
    with FileSource(file.parent, identities=identities) as source:
        assert source.size("shard") == 200
        identities.check_unchanged()
        change(file)
        with pytest.raises(ChangedFileError, match=rf"shard: changed while it was read \({SAID[change]}"):
            identities.check_unchanged()


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in (remove, remove_the_folder)])
def test_a_change_is_noticed_when_the_file_is_opened_again(file: Path, change: Callable[[Path], None]) -> None:
    """By the same source or by another one of the same load."""
    identities = FileIdentities(file.parent)
    with FileSource(file.parent, identities=identities) as source:
        source.size("shard")
        source.close()
        change(file)
        for each in (source, FileSource(file.parent, identities=identities)):
            with each, pytest.raises(ChangedFileError, match=SAID[change]):
                each.read_into("shard", 0, memoryview(bytearray(10)))


def test_a_link_that_is_turned_is_another_file(file: Path) -> None:
    turn_a_link(file)
    identities = FileIdentities(file.parent)
    with FileSource(file.parent, identities=identities) as source:
        source.size("shard")
    identities.check_unchanged()
    file.unlink()
    file.symlink_to("blob2")
    with pytest.raises(ChangedFileError, match="another file is in its place"):
        identities.check_unchanged()


def test_what_was_missing_is_to_stay_missing(file: Path) -> None:
    identities = FileIdentities(file.parent)
    identities.note(["shard", "generation_config.json"])
    identities.check_unchanged()
    (file.parent / "generation_config.json").write_text("{}")
    with pytest.raises(ChangedFileError, match=r"generation_config\.json: .*\(it was not there before\)"):
        identities.check_unchanged()


def test_reading_and_linking_elsewhere_change_nothing(file: Path) -> None:
    identities = FileIdentities(file.parent)
    identities.note(["shard"])
    file.read_bytes()
    os.utime(file.parent)
    (file.parent / "neighbour").write_text("new")
    file.with_name("link").symlink_to("shard")
    identities.check_unchanged()


def test_a_file_that_cannot_be_opened_any_more(file: Path) -> None:
    identities = FileIdentities(file.parent)
    identities.note(["shard"])
    file.unlink()
    file.symlink_to("shard")
    with pytest.raises(CheckpointError, match="shard: cannot be opened to see whether it changed: Too many levels"):
        identities.check_unchanged()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["stat", "open", "fstat"])
def test_looking_again_outlives_errors_that_pass(
    file: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = FileIdentities(file.parent)
    identities.note(["shard"])
    real, left, pauses = getattr(os, call), [4], list[float]()

    def failing(*arguments: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    monkeypatch.setattr(time, "sleep", pauses.append)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        identities.check_unchanged()
        left[0] = 5
        with pytest.raises(CheckpointError, match="cannot be opened to see whether it changed"):
            identities.check_unchanged()
    assert pauses == [0.01, 0.02, 0.04, 0.08] * 2
