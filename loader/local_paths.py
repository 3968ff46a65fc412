"""Paths as people write them: with `~`, and wrong in more ways than the system calls that take them say."""

from __future__ import annotations

import errno
from pathlib import Path

from .errors import QuantloadError

_LONGEST_SHOWN = 200
_OF_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""What systems say of names that no file can have, whatever the disk."""


def local_path(given: str | Path, what: str, error: type[QuantloadError], *, may_fail: bool = False) -> Path:
    """What a user gave as a path, `~` spelled out; raises `error`, which calls it `what`, for what cannot be one.

    With `may_fail` a disk that fails is no reason to: who uses the path goes on without what lies there.
    """
    if not str(given):
        raise error(f"{what} is empty (''); give a path")
    try:
        path = Path(given).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except PermissionError as problem:
        raise error(f"{what} is {str(given)!r}, which may not be looked at: {problem.strerror}") from problem
    except (OSError, RuntimeError, ValueError) as problem:  # too long, a user without a home, a NUL
        if may_fail and isinstance(problem, OSError) and problem.errno not in _OF_NAMES:
            return path
        said = getattr(problem, "strerror", None) or str(problem)
        shown = str(given) if len(str(given)) <= _LONGEST_SHOWN else f"{str(given)[:_LONGEST_SHOWN]}..."
        raise error(f"{what} is {shown!r}, which is no path: {said}") from problem
    return path
