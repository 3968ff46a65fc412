"""What the system refuses: memory for mappings and tensors, and threads. Each refusal names what was to be had.

A `Shortage` says nothing about the plan of a load; `memory.budget.memory_running_out` adds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import re
import threading
from collections.abc import Iterator

from .errors import MemoryBudgetError, QuantloadError
from .kernels.system_calls import resource_limit

HUGE_PAGE = 2 << 20
_CANNOT_ADVISE = (errno.EINVAL, errno.ENOSYS, errno.EPERM)
"""What madvise answers where there are no huge pages, no such call, or a filter that forbids it."""
_TENSOR = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
"""What torch's allocator for CPUs says, in a bare RuntimeError."""


STACK_BYTES = 1 << 20
"""Enough for a thread that calls compiled kernels and torch: twice what macOS gives to threads."""
COMPILER_STACK_BYTES = 8 << 20
"""Enough for one in which a compiler runs."""
_M_ARENA_MAX = -8
_stack_size = threading.Lock()
"""Held while the size that Python gives to new threads, which is that of the whole process, is another one."""


_LIBRARY = re.compile(r"failed to map segment|[Cc]annot allocate memory|cannot create shared object descriptor")
"""What the linker says of a library that it has no memory for, in an ImportError or an OSError without a number."""
_NO_THREAD = "can't start new thread"
"""What Python says of a thread that could not be started, and no more."""
_DEVICE = re.compile(r"CUDA error: out of memory|hipErrorOutOfMemory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED")
"""What libraries of GPUs say, in errors of several kinds."""
NO_MEMORY = "there was no memory for"
"""How the message of every `Shortage` of memory begins."""


class Shortage(MemoryBudgetError):
    """The system had no memory, or no thread, for something the message names."""


def map_anonymous(nbytes: int, what: str, huge: bool = True) -> mmap.mmap:
    """A private anonymous mapping, in huge pages where the system has them; `Shortage` names `what` it was."""
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            # Private: a shared mapping would be shared memory to the kernel, which has other page and limit rules.
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:  # Windows has its page file behind it
            mapping = mmap.mmap(-1, nbytes)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise refused(f"{what} ({nbytes} bytes)", error) from error
    if huge and nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        advise(mapping, mmap.MADV_HUGEPAGE)
    return mapping


def advise(mapping: mmap.mmap, advice: int) -> bool:
    """Ask the kernel for something it may refuse without harm; whether it did not."""
    if not hasattr(mapping, "madvise"):
        return False
    try:
        mapping.madvise(advice)
    except OSError as error:
        if error.errno not in _CANNOT_ADVISE:
            raise
        return False
    return True


def give_back(mapping: mmap.mmap) -> None:
    """Let the pages of a mapping go although something may still refer to it: from now on they read as zeros.

    Pages that the program has locked in memory (mlockall) stay until the mapping goes, and on Windows all do.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        advise(mapping, mmap.MADV_DONTNEED)


def start(thread: threading.Thread, what: str) -> None:
    """Start a thread; `Shortage` names `what` it was for, where the system has no room for one more."""
    with starting(what):
        thread.start()


@contextlib.contextmanager
def starting(what: str, stack_bytes: int = STACK_BYTES) -> Iterator[None]:
    """Inside, threads are started that need `stack_bytes` of stack; by default they get what the system gives.

    They get that much and no more where address space or data are limited, since a stack counts as a whole there,
    however little of it is used; and where the default, what the main thread may have (ulimit -s), is less.
    `Shortage` names `what` they were for, where the system has no room for one more.
    """
    with _stack_size:
        before = threading.stack_size()  # which sets it to 0
        if before:  # the program has chosen
            threading.stack_size(before)
        elif _needs_stack(stack_bytes):
            threading.stack_size(stack_bytes)
        try:
            yield
        except RuntimeError as error:
            if str(error) != _NO_THREAD:
                raise
            raise Shortage(
                f"{what} could not be started: there is no memory for the stack of a thread, or the limit of threads "
                f"is reached (ulimit -u, or pids.max of the cgroup)"
            ) from error
        finally:
            threading.stack_size(before)


def _needs_stack(nbytes: int) -> bool:
    """Whether threads must be given a stack of so many bytes, rather than the default."""
    default = resource_limit("RLIMIT_STACK")
    return (default is not None and default < nbytes) or _is_limited("RLIMIT_AS") or _is_limited("RLIMIT_DATA")


def _is_limited(name: str) -> bool:
    return resource_limit(name) is not None


def spare_address_space() -> None:
    """Where address space is limited, keep malloc from reserving 64 MiB of it for each thread that is still to come.

    It lasts as long as the process: threads share what they allocate from, as with MALLOC_ARENA_MAX=1. C libraries
    other than glibc reserve nothing.
    """
    if _is_limited("RLIMIT_AS"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """What cannot be had inside for want of memory raises `Shortage` with the name of it."""
    try:
        yield
    except Exception as error:
        found = shortage_behind(error)
        if found is None:
            raise
        raise refused(what, found) from error


@contextlib.contextmanager
def importing(what: str) -> Iterator[None]:
    """Libraries that there is no memory for raise `Shortage` with `what` they were for.

    They wrap the error that says so in others of their own.
    """
    try:
        yield
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None and not is_shortage(seen):
            seen = seen.__cause__ or seen.__context__
        if seen is None:
            raise
        raise refused(what, seen) from error


def shortage_behind(error: BaseException) -> BaseException | None:
    """The error that says that memory ran out: this one, or the one that it was raised from; None where none does.

    So an error about a file that could not be read for want of memory is one of memory, not of the file.
    """
    seen: BaseException | None = error
    while seen is not None and not is_shortage(seen):
        seen = seen.__cause__
    return seen


def refused(what: str, error: BaseException) -> Shortage:
    """The error for something that there was no memory for; one that names something already keeps that name."""
    if isinstance(error, Shortage):
        return error
    if isinstance(error, QuantloadError):
        return Shortage(str(error))
    said = " ".join(str(error).split()) or "out of memory"
    found = _TENSOR.search(said)
    said = f"a tensor of {found[1]} bytes" if found else said.removeprefix(f"[Errno {errno.ENOMEM}] ")
    return Shortage(f"{NO_MEMORY} {what}: {said}")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whoever raised it: Python, numpy and numba, torch, the kernel."""
    if isinstance(error, (MemoryError, Shortage)) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    said = str(error)
    if isinstance(error, (ImportError, OSError)):
        return _LIBRARY.search(said) is not None
    if isinstance(error, RuntimeError) and _DEVICE.search(said):
        return True
    return type(error) is RuntimeError and (said == _NO_THREAD or _TENSOR.search(said) is not None)
