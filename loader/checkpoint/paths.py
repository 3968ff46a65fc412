"""Which file names a checkpoint may use: relative ones that stay inside its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import UnsafePathError


def check_name(name: str, what: str) -> None:
    """Raises `UnsafePathError` unless `name` is a plain relative path; `what` says where the name stands."""
    parts = PurePosixPath(name).parts
    unsafe = (
        not parts
        or name.startswith("/")
        or ".." in parts
        or "\\" in name
        or bool(PureWindowsPath(name).drive)
        or any(ord(character) < 32 for character in name)
    )
    if unsafe:
        raise UnsafePathError(
            f"{what} names {name[:200]!r}; a checkpoint may only name files inside its own folder, "
            "by a relative path without '..': do not trust this checkpoint"
        )


def locate(root: Path, name: str) -> Path:
    """The file `name` below `root`.

    Links may lead to files inside `root` or, where `root` is a snapshot of the Hugging Face cache, to the blobs
    beside it; raises `UnsafePathError` for any other.
    """
    check_name(name, str(root))
    path = root / name
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:
        raise UnsafePathError(f"{path}: its links cannot be followed: {error}") from error
    allowed = [real_root]
    if real_root.parent.name == "snapshots":
        allowed.append(real_root.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UnsafePathError(
            f"{path} is a link to {real}, outside the checkpoint folder; put the file itself there "
            "(a copy or a hard link), or give the folder it lies in"
        )
    return path
