"""Watches what a process forces to the disk before it gives files their names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """What was forced to the disk as it is now; `lacking` are the files and folders that had a new name before."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._forced: dict[int, tuple[int, int]] = {}
        self.renamed: list[str] = []
        self.lacking: list[str] = []
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._forcing(getattr(os, name)))
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._renaming(getattr(os, name)))

    def holds(self, path: Path) -> bool:
        """Whether a file or folder was forced to the disk since it was changed."""
        status = path.stat()
        return self._forced.get(status.st_ino) == (status.st_size, status.st_mtime_ns)

    def _forcing(self, force: Any) -> Any:
        def forcing(fd: int) -> None:
            force(fd)
            status = os.fstat(fd)
            self._forced[status.st_ino] = status.st_size, status.st_mtime_ns

        return forcing

    def _renaming(self, rename: Any) -> Any:
        def renaming(source: Any, target: Any, **how: Any) -> None:
            path = Path(source)
            self.renamed.append(Path(target).name)
            self.lacking += [str(each) for each in (path, *path.rglob("*")) if not self.holds(each)]
            rename(source, target, **how)

        return renaming
