"""What one request took: its tokens, and when they came."""

from __future__ import annotations

import time
from dataclasses import dataclass

Moment = float
"""Seconds of `time.monotonic`."""


@dataclass(eq=False)
class Usage:
    """Counts of one request, all its generations together; written while it runs, by the thread that generates.

    `queued_at` is when its prompt was accepted, `begun_at` when a generation began, or with continuous batching gave
    its first token. Without a generation the counts stay 0 and the moments None.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    queued_at: Moment | None = None
    begun_at: Moment | None = None
    first_token_at: Moment | None = None
    last_token_at: Moment | None = None

    def queue(self, prompt_tokens: int) -> None:
        """A prompt of so many tokens was accepted, and waits for its turn."""
        self.prompt_tokens += prompt_tokens
        self.queued_at = self.queued_at or time.monotonic()

    def begin(self) -> None:
        """A generation begins."""
        self.begun_at = self.begun_at or time.monotonic()

    def generate(self, tokens: int) -> None:
        """So many tokens came out of the model."""
        self.begin()
        self.completion_tokens += tokens
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at

    @property
    def waiting(self) -> bool:
        """Whether it is queued and has no generation yet."""
        return self.queued_at is not None and self.begun_at is None

    @property
    def running(self) -> bool:
        """Whether a generation has begun."""
        return self.begun_at is not None

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time between tokens, None for less than two of them."""
        if self.first_token_at is None or self.last_token_at is None or self.completion_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.completion_tokens - 1)
