"""What the exit code of a command says."""

from __future__ import annotations

from ..errors import (
    CheckpointError,
    MemoryBudgetError,
    PolicyError,
    RouteError,
    UnsupportedCheckpointError,
)
from ..shortage import shortage_behind

EXIT_USAGE, EXIT_CHECKPOINT, EXIT_BUDGET, EXIT_OTHER, EXIT_INTERRUPTED = 2, 3, 4, 1, 130


def exit_code(error: BaseException) -> int:
    """The code of a command that ends with `error`; what lacked memory, however deep, is about the budget."""
    if isinstance(error, MemoryBudgetError) or shortage_behind(error) is not None:
        return EXIT_BUDGET
    if isinstance(error, (CheckpointError, RouteError, UnsupportedCheckpointError)):
        return EXIT_CHECKPOINT
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USAGE if isinstance(error, PolicyError) else EXIT_OTHER
