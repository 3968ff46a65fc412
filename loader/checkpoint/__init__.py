"""What is on disk: from a folder or hub id to checked headers, and from there to bytes in reused buffers."""

from .headers import ShardHeader, TensorEntry, read_header
from .index import CheckpointIndex, Shard, read_index
from .pieces import Barrier, Piece
from .reader import PieceReader, ReadTotals
from .resolve import Checkpoint, resolve
from .source import FileSource, Source
from .workspace import Workspace

__all__ = [
    "Barrier",
    "Checkpoint",
    "CheckpointIndex",
    "FileSource",
    "Piece",
    "PieceReader",
    "ReadTotals",
    "Shard",
    "ShardHeader",
    "Source",
    "TensorEntry",
    "Workspace",
    "read_header",
    "read_index",
    "resolve",
]
