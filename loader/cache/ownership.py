"""Whose a cache is: believed and written to are files of this user, or of root, that others cannot change.

An entry is codes that nobody can tell from right ones by looking at them, and its checksums stand beside them: whoever
may write to the folder says what the model is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..kernels.system_calls import others_may_write, user_owns


def check_folder(folder: Path, *, links: bool = False) -> None:
    """Raise `PermissionError` unless a folder is one that only this user, or root, can change what is in.

    With `links` it may be a link of theirs to such a folder. Raises other `OSError`s where it cannot be looked at.
    """
    status = folder.lstat()
    if links and stat.S_ISLNK(status.st_mode) and user_owns(status, or_root=True):
        status = folder.stat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{folder} is a link; give the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{folder} is no folder")
    if not user_owns(status, or_root=True):
        raise PermissionError(
            f"{folder} belongs to another user (uid {status.st_uid}), who could put other weights there; give a folder "
            f"of your own"
        )
    if others_may_write(status):
        raise PermissionError(
            f"others may write to {folder}, and could put other weights there; 'chmod go-w' it, or give another folder"
        )


def check_file(path: Path, status: os.stat_result) -> None:
    """Raise `PermissionError` unless an open file of a cache is a file of its own of this user or of root."""
    if not stat.S_ISREG(status.st_mode) or not user_owns(status, or_root=True) or status.st_nlink > 1:
        raise PermissionError(f"{path} is a link, belongs to another user, or is no file; remove it")
