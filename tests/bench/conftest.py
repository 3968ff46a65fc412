"""The benchmarks are scripts beside each other: their folder goes on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"


def pytest_configure() -> None:
    """Put `bench/` on the path last, so that its module names hide nothing."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))


pytest_configure()  # a conftest below the root is imported after the hook has run
