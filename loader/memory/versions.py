"""What a load ran with: the versions that have a say in what it makes and how fast."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

PACKAGES = ("quantload", "torch", "transformers", "safetensors", "numba", "numpy", "triton")


@cache
def versions() -> dict[str, str]:
    """Versions by name: Python's, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # triton comes with torch's builds for GPUs; others in a source tree
            continue
    return found
