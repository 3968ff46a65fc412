"""What is read while libraries are imported: weights of a load from a folder here, as far as memory is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from quantload.checkpoint import bringing_in
from quantload.checkpoint.folder import Checkpoint
from quantload.cli import DEMO_MODEL
from quantload.cli.model_options import SourceOptions
from quantload.cli.preparing import found_here, libraries_while_reading
from quantload.memory import limits
from quantload.memory.limits import MACHINE, MemoryLimit
from quantload.options import LoadOptions

GIB = 1 << 30
FREE = MemoryLimit(MACHINE, 12 * GIB, 4 * GIB, is_virtual=False)
SMALLER = MemoryLimit("a cgroup", 4 * GIB, 0, is_virtual=False)
MAPPED = MemoryLimit("the address space", 1 << 40, 0, is_virtual=True)


@pytest.mark.parametrize(
    ("free", "model", "load_format", "options", "most"),
    [
        ([FREE], DEMO_MODEL, "auto", {}, [2 * GIB]),
        ([FREE, SMALLER], DEMO_MODEL, "auto", {}, [GIB]),
        ([FREE, MAPPED], DEMO_MODEL, "auto", {}, [0]),
        ([FREE], DEMO_MODEL, "dummy", {}, []),
        ([FREE], DEMO_MODEL, "auto", {"cache": "entries"}, []),
        ([FREE], "owner/name", "auto", {}, []),
    ],
)
def test_how_much_is_read(
    free: list[MemoryLimit],
    model: str | Path,
    load_format: str,
    options: dict[str, Any],
    most: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    @contextmanager
    def noted(checkpoint: Checkpoint, most_bytes: int) -> Iterator[None]:
        assert checkpoint.root == DEMO_MODEL.resolve()
        asked.append(most_bytes)
        yield

    monkeypatch.setattr(bringing_in, "bringing_in", noted)
    monkeypatch.setattr(limits, "memory_limits", lambda: free)
    given = found_here(str(model), SourceOptions())
    with libraries_while_reading(given, load_format, LoadOptions(**options)):
        assert asked == most
