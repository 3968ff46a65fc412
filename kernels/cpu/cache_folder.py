"""Where compiled kernels are kept: in a folder of the user's, never beside the sources.

What numba writes into `__pycache__` outlives an uninstall: a folder `quantload` without sources stays among the
installed packages, which is then imported instead of an editable install. So numba is told of one more place, which it
uses for the functions of this package alone:

    ~/.cache/quantload/kernels/KEY        XDG_CACHE_HOME instead of ~/.cache; ~/Library/Caches on macOS

`NUMBA_CACHE_DIR` comes first where it is set. KEY names all that the machine code of a kernel depends on besides the
processor, which the files in the folder are named by: two installs share a folder if their kernels have the same
sources, and else leave each other's alone. Of the folders, those used last are kept.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

import numba
from numba.core.caching import FunctionCache, UserProvidedCacheLocator

from ..system_calls import others_may_write, user_owns

FOLDERS_KEPT = 8
"""Versions of quantload's kernels, of Python and of numba together: about as many as environments somebody works in."""
_HERE = str(Path(__file__).parent) + os.sep
NO_FOLDER = "cannot cache"
"""What numba's own error begins with where it finds no folder to write to."""


def user_cache() -> Path | None:
    """The folder for caches of the user this process runs as; `None` for one without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():
        return None
    return home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"


def folder_name(fingerprint: str) -> str:
    """The key of the kernels made of sources with this fingerprint, by this Python and numba."""
    python = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
    return f"{python}-numba-{numba.__version__}-{fingerprint[:16]}"


def own_folder(root: Path, key: str) -> Path:
    """The folder `root/quantload/kernels/key`, there and writable by this user alone; OSError where that cannot be.

    Machine code is read from it, so that one that others could write to, or put another in place of, is refused. Links
    of this user's are followed.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = root.stat()
    if others_may_write(facts) and facts.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
        raise PermissionError(f"everybody may replace what is in {root}")
    folder = root
    for part in ("quantload", "kernels", key):
        folder = folder / part
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if stat.S_ISLNK(facts.st_mode) and user_owns(facts):
            facts = folder.stat()
        if not stat.S_ISDIR(facts.st_mode) or not user_owns(facts) or others_may_write(facts):
            raise PermissionError(f"{folder} belongs to another user, or others may write to it")
    tempfile.TemporaryFile(dir=folder).close()
    _used(folder)
    return folder


@cache
def _used(folder: Path) -> None:
    """Note that this process uses a folder, and remove those beside it that nobody has used for longest."""
    with suppress(OSError):  # another process may be removing what it has not used for long
        os.utime(folder)
        others = [Path(entry) for entry in os.scandir(folder.parent) if entry.is_dir(follow_symlinks=False)]
        by_age = sorted((other for other in others if other != folder), key=lambda other: -other.stat().st_mtime)
        for old in by_age[FOLDERS_KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)


class KernelLocator:
    """What numba asks where to cache a function; serves the functions of this package alone."""

    fingerprint = ""

    def __init__(self, py_func: Callable[..., Any], py_file: str, folder: Path) -> None:
        self._py_file, self._folder = py_file, folder
        self._line = py_func.__code__.co_firstlineno

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Self | None:
        """The place of a function; `None` for one of another package. RuntimeError, as numba's, where there is none."""
        if not py_file.startswith(_HERE):
            return None
        root = user_cache()
        if root is None:
            raise RuntimeError(f"{NO_FOLDER} {py_func.__qualname__}: this user has no home")
        try:
            return cls(py_func, py_file, own_folder(root, folder_name(cls.fingerprint)))
        except OSError as error:
            raise RuntimeError(f"{NO_FOLDER} {py_func.__qualname__}: {error}") from error

    def ensure_cache_path(self) -> None:
        """Called before a file is written: another process may have removed the folder meanwhile."""
        own_folder(self._folder.parents[2], self._folder.name)

    def get_cache_path(self) -> str:
        """The folder its files are in."""
        return str(self._folder)

    def get_source_stamp(self) -> str:
        """What makes an entry obsolete when it changes: the same for all copies of the same sources."""
        return self.fingerprint

    def get_disambiguator(self) -> str:
        """What tells functions of one name in one file apart."""
        return str(self._line)


def register(fingerprint: str) -> None:
    """Have numba cache the functions of this package, whose sources have `fingerprint`, in the user's folder."""
    KernelLocator.fingerprint = fingerprint
    places = FunctionCache._impl_class._locator_classes
    if KernelLocator not in places:
        places.insert(places.index(UserProvidedCacheLocator) + 1, KernelLocator)
