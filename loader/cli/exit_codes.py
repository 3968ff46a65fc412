"""What the exit code of a command says."""

from __future__ import annotations

from ..errors import (
    CheckpointError,
    MemoryBudgetError,
    PolicyError,
    QuantloadError,
    RouteError,
    UnsupportedCheckpointError,
)
from ..shortage import shortage_behind

EXIT_USAGE, EXIT_CHECKPOINT, EXIT_BUDGET, EXIT_OTHER = 2, 3, 4, 1


def exit_code(error: QuantloadError) -> int:
    """The code of a command that ends with `error`; what lacked memory, however deep, is about the budget."""
    if isinstance(error, MemoryBudgetError) or shortage_behind(error) is not None:
        return EXIT_BUDGET
    if isinstance(error, (CheckpointError, RouteError, UnsupportedCheckpointError)):
        return EXIT_CHECKPOINT
    return EXIT_USAGE if isinstance(error, PolicyError) else EXIT_OTHER
