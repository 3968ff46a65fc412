"""What a checkpoint has and the model does not know, and the other way round, where a load goes on all the same."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from ..errors import CheckpointError, UnexpectedWeightsError

NAMES_SHOWN = 8
logger = logging.getLogger("quantload")


class Sized(Protocol):
    """A checkpoint tensor, as far as it is looked at here."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""


@dataclass(frozen=True)
class Leftovers:
    """Names in order, as transformers' `from_pretrained` reports them.

    `unexpected` are checkpoint tensors that the class of the model does not know, with their bytes in the checkpoint;
    `ignored` those that it says may be left out: nothing is read of either. `initialized` are the parameters that it
    says may be missing, which it initializes; `overlaid` are tensors that lie in more than one shard, of which only the
    one that the index names is read.
    """

    model_class: str = ""
    unexpected: tuple[str, ...] = ()
    unexpected_bytes: int = 0
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    overlaid: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model_class: str,
        surplus: Collection[str],
        unknown: Iterable[str],
        initialized: Iterable[str],
        tensors: Mapping[str, Sized],
    ) -> Self:
        """Of the `unknown` tensors of a checkpoint, `surplus` are those that the class makes no exception for."""
        nbytes = sum(tensors[name].nbytes for name in surplus if name in tensors)
        ignored = (name for name in unknown if name not in surplus)
        return cls(model_class, tuple(sorted(surplus)), nbytes, tuple(ignored), tuple(sorted(initialized)))

    def check(self, strict: bool) -> None:
        """Warn of what is left out and of what is initialized without a tensor.

        With `strict`, what is left out is an `UnexpectedWeightsError`, a tensor in several shards a `CheckpointError`.
        """
        if self.unexpected:
            said = (
                f"{len(self.unexpected)} checkpoint tensors ({self.unexpected_bytes:,} bytes) that no parameter of "
                f"{self.model_class} takes: {some(self.unexpected)}"
            )
            if strict:
                raise UnexpectedWeightsError(
                    f"{said}; is config.json the one of this checkpoint? Without --strict (strict=True) they are left "
                    f"out with a warning"
                )
            logger.warning("%s; they are not loaded", said)
        if self.overlaid:
            said = f"{len(self.overlaid)} tensors lie in more than one shard: {some(self.overlaid)}"
            if strict:
                raise CheckpointError(
                    f"{said}; remove the stale files, or save the checkpoint again. Without --strict (strict=True) "
                    f"those of the shards that the index names are loaded with a warning"
                )
            logger.warning("%s; those of the shards that the index names are loaded", said)
        if self.initialized:
            logger.warning(
                "%d parameters of %s have no tensor in the checkpoint and are initialized, which this class allows: %s",
                len(self.initialized),
                self.model_class,
                some(self.initialized),
            )


def some(names: Iterable[str]) -> str:
    """The first few of some names, in order, and how many there are more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return ", ".join(ordered[:NAMES_SHOWN]) + more
