"""Threads that work until done, cancelled or failed, and are always joined."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from ..errors import LoadCancelledError
from ..interrupts import raise_forgotten
from ..shortage import start

_TICK = 0.1
_torch_threads = threading.Lock()
_here = threading.local()
_set_num_threads = torch._C.set_num_threads
"""torch's own: vLLM puts a warning into the place of `torch.set_num_threads`, for all threads of the process."""


class Stopped(Exception):
    """Raised in a worker to leave it quietly because the load is ending."""


def leave_if_stopping() -> None:
    """For what waits in a worker: raise `Stopped` if the crew of this thread is stopping."""
    crew: Crew | None = getattr(_here, "crew", None)
    if crew is not None and crew.stopping:
        raise Stopped


class Crew:
    """`count` threads named `quantload-reader-N`.

    Inside the threads torch runs on one thread, since the workers are the parallelism; elsewhere its setting is
    unchanged.
    """

    def __init__(self, count: int, cancel: threading.Event | None) -> None:
        self._count = count
        self._cancel = cancel
        self._stop = False
        self._left_early = False
        self._errors: list[BaseException] = []
        self._running = count
        self._finished = threading.Event()
        self._ready = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    @property
    def stopping(self) -> bool:
        """Whether workers should leave: something failed, or the load was cancelled."""
        return self._stop or (self._cancel is not None and self._cancel.is_set())

    def work(self, body: Callable[[Crew, int], None], on_tick: Callable[[], None] | None = None) -> None:
        """Runs `body(crew, N)` in thread N, to the end of all, calling `on_tick` in this thread ten times a second.

        A body looks at `stopping` often and leaves by raising `Stopped`. Raises the first error of a worker, the others
        added to it as notes, or `LoadCancelledError` when the cancel event made one leave. Whatever happens,
        KeyboardInterrupt included, no thread is left when it returns.
        """
        self._threads = [
            threading.Thread(target=self._run, args=(body, number), name=f"quantload-reader-{number}")
            for number in range(self._count)
        ]
        try:
            with _one_torch_thread():
                for number, thread in enumerate(self._threads, 1):
                    start(thread, f"thread {number} of the {self._count} that read and quantize")
                for _ in self._threads:
                    self._ready.acquire()
            while not self._finished.wait(_TICK):
                raise_forgotten()
                if on_tick is not None:
                    on_tick()
        finally:
            self._join()
        if self._errors:
            self._raise_first()
        if self._left_early:
            raise LoadCancelledError("the load was cancelled before it finished; nothing of it remains, start it again")

    def _raise_first(self) -> None:
        (first, *others), self._errors = self._errors, []
        for other in others:
            first.add_note(f"another reader failed too: {type(other).__name__}: {other}")
        try:
            raise first
        finally:
            # The traceback refers to this frame; a cycle would keep what it holds until the next collection.
            del first, others

    def _run(self, body: Callable[[Crew, int], None], number: int) -> None:
        try:
            try:
                # Asking first makes torch initialise this thread, which would undo the setting later.
                torch.get_num_threads()
                _set_num_threads(1)
            finally:
                self._ready.release()
            _here.crew = self
            body(self, number)
        except Stopped:
            self._left_early = True
        except BaseException as error:
            self._stop = True
            self._errors.append(error)
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._finished.set()

    def _join(self) -> None:
        if not self._finished.is_set():
            self._stop = True
        interrupted: KeyboardInterrupt | None = None
        for thread in self._threads:
            while thread.is_alive():
                try:
                    thread.join()
                except KeyboardInterrupt as error:
                    # A second Ctrl-C must not leave threads behind; they are leaving already.
                    interrupted = error
        # A thread that could not be started still refers to this crew and the body.
        self._threads.clear()
        if interrupted is not None:
            raise interrupted


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Puts torch's thread count back after the workers, inside, have set their own.

    With OpenMP `torch.set_num_threads` sets the calling thread's count and the default of threads to come; only the
    second must be undone.
    """
    with _torch_threads:
        before = torch.get_num_threads()
        try:
            yield
        finally:
            _set_num_threads(before)
