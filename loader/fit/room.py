"""The size that schemes are to be chosen for: as it was given, or what is free here less what a server needs beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..draft import Draft
from ..errors import MemoryBudgetError
from ..memory.amounts import MIB, format_bytes
from ..memory.limits import MemoryLimit, device_limit, memory_limits
from ..model.attention_cache import attention_cache_bytes, context_length
from ..options import LoadOptions

MOST_CONTEXT = 8192
"""Tokens of a sequence that room is left for where nothing was said; fewer where the model has a shorter context."""
RESERVE = 20
"""A part of what is free that stays so: other processes take some, and the next load finds a little less."""


@dataclass(frozen=True)
class Room:
    """`size` bytes that `of` may take: a load at its peak, or a checkpoint in its files of weights.

    Where they were not given: what was available, and what was taken off it; `cache_bytes` are those of the attention
    cache of `requests` sequences of `context` tokens.
    """

    size: int
    of: Literal["the load", "the checkpoint"] = "the load"
    available_bytes: int | None = None
    limited_by: str | None = None
    reserve_bytes: int = 0
    cache_bytes: int = 0
    context: int | None = None
    requests: int | None = None

    def __str__(self) -> str:
        if self.available_bytes is None:
            return f"{format_bytes(self.size)} were given"
        cache = (
            f"{format_bytes(self.cache_bytes)} for an attention cache of {self.requests} x {self.context:,} tokens "
            f"(--requests, --context)"
            if self.context is not None
            else "nothing for an attention cache, as the model has none of a known size"
        )
        return (
            f"{format_bytes(self.available_bytes)} are free ({self.limited_by}), less "
            f"{format_bytes(self.reserve_bytes)} in reserve and {cache}"
        )

    def advice(self, nbytes: int) -> list[str]:
        """What would make room for `nbytes`."""
        if self.available_bytes is None:
            return [f"give --fit {-(-nbytes // MIB)}MiB"]
        return [
            *(["ask for a smaller attention cache: --context, --requests"] if self.cache_bytes else []),
            "free some",
        ]

    @property
    def because(self) -> str:
        """How the size came about, for the end of a message; nothing where it was given."""
        return "" if self.available_bytes is None else f": {self}"


def free_room(draft: Draft, options: LoadOptions) -> Room:
    """What the machine, or the device that the model goes to, has free for a model that is to serve requests.

    A twentieth of it stays free, and so does an attention cache of `options.fit_requests` sequences of
    `options.fit_context` tokens (one of `MOST_CONTEXT`, where the model has such a context). Raises
    `MemoryBudgetError` where that leaves nothing.
    """
    device = device_limit(draft.schemes.device)
    limit = device if device is not None else _nearest(memory_limits())
    config, model = draft.model.config, draft.model
    context = options.fit_context or min(context_length(config) or MOST_CONTEXT, MOST_CONTEXT)
    requests = options.fit_requests or 1
    one = attention_cache_bytes(config, context, model.dtype) if model.can_generate() else None
    reserve = limit.available // RESERVE
    cache = 0 if one is None else one * requests
    room = Room(
        size=max(0, limit.available - reserve - cache),
        available_bytes=limit.available,
        limited_by=limit.name,
        reserve_bytes=reserve,
        cache_bytes=cache,
        context=None if one is None else context,
        requests=None if one is None else requests,
    )
    if not room.size:
        advice = "; or ".join(room.advice(1))
        raise MemoryBudgetError(f"fit is auto, and nothing is left for the model: {room}: {advice}")
    return room


def _nearest(limits: Sequence[MemoryLimit]) -> MemoryLimit:
    return min(limits, key=lambda limit: limit.available)
