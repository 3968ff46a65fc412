"""Readers with one fault each: whoever looks for faults and finds none must be known to find these."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fuzz_readers import Wrong
from quantload.errors import CheckpointError

FAULTS = ("raw error", "wrong", "message", "memory", "hang", "died")


class FaultyReader:
    """Reads nothing right: its inputs are the kinds of faults, and three that are none."""

    names = ("faulty.json",)
    slow = True

    def __init__(self, folder: Path) -> None:
        self._inputs = [kind.encode() for kind in ("refused", *FAULTS, "read", "refused", "read")]

    def corpus(self) -> list[bytes]:
        return [b"read"]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        return self._inputs[rng.randrange(len(self._inputs))], "kind"

    def read(self, data: bytes) -> None:
        act: dict[str, Callable[[], object]] = {
            "raw error": lambda: {"some": 1}["missing"],
            "wrong": _wrong,
            "message": lambda: _refuse("something is not right"),
            "memory": lambda: b"x" * (300 << 20),
            "hang": lambda: time.sleep(60),
            "died": lambda: ctypes.string_at(0),
            "refused": lambda: _refuse("faulty.json: says no"),
        }
        act.get(data.decode(), lambda: None)()


def _wrong() -> None:
    raise Wrong("other values")


def _refuse(message: str) -> None:
    raise CheckpointError(message)
