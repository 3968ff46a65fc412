"""Paths as people write them: with `~`, and wrong in more ways than the system calls that take them say."""

from __future__ import annotations

from pathlib import Path

from .errors import QuantloadError

_LONGEST_SHOWN = 200


def local_path(given: str | Path, what: str, error: type[QuantloadError]) -> Path:
    """What a user gave as a path, `~` spelled out; raises `error`, which calls it `what`, for what cannot be one."""
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
        said = getattr(problem, "strerror", None) or str(problem)
        shown = str(given) if len(str(given)) <= _LONGEST_SHOWN else f"{str(given)[:_LONGEST_SHOWN]}..."
        raise error(f"{what} is {shown!r}, which is no path: {said}") from problem
    return path
