"""What people write for paths: names that no file can have are refused, and a disk that fails where that counts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from quantload import LoadOptions
from quantload.errors import PolicyError
from quantload.local_paths import local_path


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_a_disk_that_fails_is_said_unless_one_can_do_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "cache"
    monkeypatch.setattr(Path, "lstat", failing)
    with pytest.raises(PolicyError, match=os.strerror(number)):
        local_path(path, "the text", PolicyError)
    assert local_path(path, "the text", PolicyError, may_fail=True) == path
    assert LoadOptions(cache=path).cache == path  # a load goes on without its cache


def test_no_file_can_have_such_a_name() -> None:
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(PolicyError, match="is no path"):
            LoadOptions(cache=name)
