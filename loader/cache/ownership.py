"""Whose a cache is: believed and written to are files of this user, or of root, that others cannot change.

An entry is codes that nobody can tell from right ones by looking at them, and its checksums stand beside them: whoever
may write to the folder says what the model is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_folder(folder: Path, *, links: bool = False) -> None:
    """Raise `PermissionError` unless a folder is one that only this user, or root, can change what is in.

    With `links` it may be a link of theirs to such a folder. Raises other `OSError`s where it cannot be looked at.
    """
    status = folder.lstat()
    if links and stat.S_ISLNK(status.st_mode) and _owned(status):
        status = folder.stat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{folder} is a link; give the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{folder} is no folder")
    if not _owned(status):
        raise PermissionError(
            f"{folder} belongs to another user (uid {status.st_uid}), who could put other weights there; give a folder "
            f"of your own"
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise PermissionError(
            f"others may write to {folder}, and could put other weights there; 'chmod go-w' it, or give another folder"
        )


def check_file(path: Path, status: os.stat_result) -> None:
    """Raise `PermissionError` unless an open file of a cache is a file of its own of this user or of root."""
    if not stat.S_ISREG(status.st_mode) or not _owned(status) or status.st_nlink > 1:
        raise PermissionError(f"{path} is a link, belongs to another user, or is no file; remove it")


def _owned(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)
