"""What a load had done when it failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..page.advice import class_names
from ..progress import Moment
from .report import PhaseReport, TimelinePoint
from .versions import versions


@dataclass(frozen=True)
class Attempt:
    """Where a load was when it failed, the highest memory until then (bytes, above the one before), and the way there.

    `where.phase` is the part of the load that failed.
    """

    where: Moment
    peak_bytes: int
    timeline: list[TimelinePoint]
    phases: list[PhaseReport]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_failure(
    error: BaseException,
    *,
    model: str,
    quantization: str,
    device: str,
    command: str | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """A load that failed, as JSON: what was asked for, the error with the names of its classes, how far it came.

    `options` are the names of those that it was given.
    """
    attempt = attempt_behind(error)
    return {
        "model": model,
        "quantization": quantization,
        "device": device,
        "error": {
            "types": class_names(error),
            "message": str(error),
        },
        "attempt": None if attempt is None else attempt.to_dict(),
        "command": command,
        "options": [*options],
        "versions": dict(versions()),
    }


def attempt_behind(error: BaseException) -> Attempt | None:
    """What a load had done, of an error or of one behind it."""
    found = (getattr(each, "attempt", None) for each in _causes(error))
    return next((attempt for attempt in found if isinstance(attempt, Attempt)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
