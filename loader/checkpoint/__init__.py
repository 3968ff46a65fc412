"""What is on disk: from a folder or hub id to checked headers, and from there to bytes in reused buffers.

What looks at a folder does not import torch; the rest is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .folder import Checkpoint as Checkpoint
from .source import FileSource as FileSource
from .source import Source as Source

if TYPE_CHECKING:
    from .headers import ShardHeader as ShardHeader
    from .headers import TensorEntry as TensorEntry
    from .headers import read_header as read_header
    from .index import CheckpointIndex as CheckpointIndex
    from .index import Shard as Shard
    from .index import read_index as read_index
    from .pieces import Barrier as Barrier
    from .pieces import Piece as Piece
    from .reader import PieceReader as PieceReader
    from .reader import ReadTotals as ReadTotals
    from .workspace import Workspace as Workspace

_HOMES = {
    "headers": ("ShardHeader", "TensorEntry", "read_header"),
    "index": ("CheckpointIndex", "Shard", "read_index"),
    "pieces": ("Barrier", "Piece"),
    "reader": ("PieceReader", "ReadTotals"),
    "workspace": ("Workspace",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted((*_HOME_OF, "Checkpoint", "FileSource", "Source"))


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
