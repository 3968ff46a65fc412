from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from quantload.server.generation import CheckedQueue, CountPenalty, GenerationFailed
from quantload.server.stop_strings import StopMatcher


def test_penalties_are_openais_formula() -> None:
    prompt, generated = [0, 0], [1, 1, 2]
    ids = torch.tensor([prompt + generated])
    penalty = CountPenalty(frequency=0.5, presence=0.25)
    assert not penalty(torch.tensor([prompt]), torch.zeros(1, 4)).any()
    out = penalty(ids, torch.zeros(1, 4))
    assert out.tolist() == [[0.0, -1.25, -0.75, 0.0]]


class Failure:
    def __init__(self, msg: str) -> None:
        self.msg = msg


def test_the_queue_trims_at_a_stop_string_and_raises_errors() -> None:
    async def run() -> None:
        inner: asyncio.Queue[Any] = asyncio.Queue()
        queue = CheckedQueue(inner, StopMatcher(["\n\n"]), Failure)
        for item in ("a\n", "b\n", "\nc", None):
            inner.put_nowait(item)
        assert [await queue.get() for _ in range(3)] == ["a", "\nb", None]

        queue = CheckedQueue(inner, StopMatcher(["!"]), Failure)
        inner.put_nowait("x")
        inner.put_nowait(Failure("boom"))
        assert queue.get_nowait() == "x"
        with pytest.raises(asyncio.QueueEmpty):
            queue.get_nowait()
        with pytest.raises(GenerationFailed, match="boom"):
            await queue.get()

    asyncio.run(run())
