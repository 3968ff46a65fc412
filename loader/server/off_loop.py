"""Work that takes its time, in a few threads, so that the event loop goes on answering others.

JSON, chat templates and tokenizers are such work; transformers' handlers do the last two within their coroutines. A
coroutine may run here step by step, each in a thread; what needs the event loop is handed back with `on_loop`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

from .api_errors import ApiError

Result = TypeVar("Result")

THREADS = 2
LARGE_BYTES = 256 << 10
"""Requests from here on wait for each other, so that a thread is left for the others."""
LOOP_SECONDS = 60.0


class Workers:
    """The threads, for one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="quantload-request")
        self._stopped = False
        self._large = asyncio.Semaphore(THREADS - 1)

    async def run(self, work: Callable[[], Result], nbytes: int) -> Result:
        """What `work` returns or raises, done in a thread; `nbytes` is the size of the request it is for."""
        if self._stopped:
            raise ApiError(503, "the server is stopping", code="server_stopping")
        async with self._large if nbytes >= LARGE_BYTES else nullcontext():
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run_coroutine(self, coroutine: Coroutine[Any, Any, Result], nbytes: int) -> Result:
        """What a coroutine returns or raises, whose steps may block and which awaits nothing but `OnLoop`."""
        step: Callable[[], Any] = partial(coroutine.send, None)
        while True:
            ended, value = await self.run(partial(_step, step), nbytes)
            if ended:
                return value  # type: ignore[no-any-return]
            try:
                step = partial(coroutine.send, await asyncio.wrap_future(value))
            except Exception as error:
                step = partial(coroutine.throw, error)

    def stop(self) -> None:
        """Take no more work; what was taken is done."""
        self._stopped = True
        self._pool.shutdown(wait=False)


def _step(step: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether a coroutine ended with this step, and its result or what it waits for."""
    try:
        return False, step()
    except StopIteration as end:  # which a future cannot hold
        return True, end.value


class OnLoop(Awaitable[Result]):
    """Awaited by a coroutine in `Workers.run_coroutine`: another one runs on `loop`, and no thread waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._future = asyncio.run_coroutine_threadsafe(coroutine, loop)

    def __await__(self) -> Generator[Future[Result], Result, Result]:
        return (yield self._future)


def on_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, done on the event loop; the thread that asks waits for it."""

    async def done() -> Result:
        return work()

    return asyncio.run_coroutine_threadsafe(done(), loop).result(LOOP_SECONDS)
