"""Finds the package in the repository that this script is part of, where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
LOADER, KERNELS = ROOT / "loader", ROOT / "kernels"


def is_ours() -> bool:
    """Whether `import quantload` finds this repository's package."""
    spec = importlib.util.find_spec("quantload")
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == LOADER


@contextmanager
def package_in_place() -> Iterator[None]:
    """In the block `import quantload` is this repository's, here and in processes that are started.

    Where it is not installed from here, a folder of links comes first on the path: `quantload/` with what is in
    `loader/`, and `kernels` in it, whether or not the link of that name survived the way to this machine.
    """
    if is_ours():
        yield
        return
    with TemporaryDirectory(prefix="quantload-") as folder:
        package = Path(folder) / "quantload"
        package.mkdir()
        for path in LOADER.iterdir():
            if path.name not in ("kernels", "__pycache__"):
                (package / path.name).symlink_to(path)
        (package / "kernels").symlink_to(KERNELS)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(folder)
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
