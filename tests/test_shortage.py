"""Memory and threads that the system refuses."""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
import threading
from typing import Any

import pytest
from quantload import shortage
from quantload.errors import CheckpointError, MemoryBudgetError
from quantload.shortage import (
    COMPILER_STACK_BYTES,
    STACK_BYTES,
    Shortage,
    advise,
    importing,
    is_shortage,
    map_anonymous,
    named,
    refused,
    shortage_behind,
    start,
    starting,
)

UNLIMITED = resource.RLIM_INFINITY


def limit(monkeypatch: pytest.MonkeyPatch, **soft: int) -> None:
    """Soft limits by name, such as AS; all others are unlimited."""
    found = {getattr(resource, f"RLIMIT_{name}"): value for name, value in soft.items()}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (found.get(number, UNLIMITED), UNLIMITED))


@pytest.mark.parametrize(
    ("limits", "wanted", "given"),
    [
        ({}, STACK_BYTES, 0),
        ({"STACK": 8 << 20}, STACK_BYTES, 0),
        ({"STACK": 64 << 10}, STACK_BYTES, STACK_BYTES),
        ({"STACK": 1 << 30, "AS": 1 << 40}, STACK_BYTES, STACK_BYTES),
        ({"STACK": 8 << 20, "DATA": 1 << 40}, STACK_BYTES, STACK_BYTES),
        ({"STACK": 4 << 20}, COMPILER_STACK_BYTES, COMPILER_STACK_BYTES),
    ],
)
def test_stacks_are_as_large_as_limits_allow(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], wanted: int, given: int
) -> None:
    limit(monkeypatch, **limits)
    with starting("a thread", wanted):
        assert threading.stack_size() == given  # which sets it to 0
        threading.stack_size(given)
    assert threading.stack_size() == 0


def test_a_stack_size_that_the_program_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, AS=1 << 40)
    threading.stack_size(4 << 20)
    try:
        with starting("a thread"):
            assert threading.stack_size() == 4 << 20  # which sets it to 0
        assert threading.stack_size() == 4 << 20
    finally:
        threading.stack_size(0)


def test_a_thread_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryBudgetError, match="the thread that waits could not be started"):
        start(threading.Thread(), "the thread that waits")
    with pytest.raises(RuntimeError, match="another error"), starting("a thread"):
        raise RuntimeError("another error")


def test_malloc_is_told_to_reserve_nothing_only_where_address_space_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    class Library:
        mallopt = staticmethod(lambda *arguments: told.append(arguments))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    limit(monkeypatch, DATA=1 << 40)
    shortage.spare_address_space()
    assert told == []
    limit(monkeypatch, AS=1 << 40)
    shortage.spare_address_space()
    assert told == [(-8, 1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # a C library without mallopt
    shortage.spare_address_space()


def test_a_mapping_that_is_refused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(answer, "no")

    monkeypatch.setattr(mmap, "mmap", refuse)
    answer = errno.ENOMEM
    with pytest.raises(MemoryBudgetError, match=r"no memory for the arena \(4096 bytes\)"):
        map_anonymous(4096, "the arena")
    answer = errno.EPERM
    with pytest.raises(OSError, match="no"):
        map_anonymous(4096, "the arena")


@pytest.mark.parametrize(("answer", "is_passed"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EBADF, False)])
def test_advice_may_be_refused_without_harm(answer: int, is_passed: bool) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(answer, "no")

    mapping = Refusing(-1, 4096)
    if is_passed:
        assert not advise(mapping, mmap.MADV_DONTNEED)
    else:
        with pytest.raises(OSError, match="no"):
            advise(mapping, mmap.MADV_DONTNEED)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (ImportError("libx.so: cannot open shared object file: No such file or directory"), False),
        (ModuleNotFoundError("No module named 'numba'"), False),
        (OSError("libllvmlite.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("size mismatch"), False),
        (Shortage("there was no memory for it"), True),
    ],
    ids=repr,
)
def test_a_shortage_is_known_by_who_says_so(error: Exception, is_one: bool) -> None:
    assert is_shortage(error) is is_one
    wrapped = CheckpointError("config.json cannot be read")
    wrapped.__cause__ = error
    assert (shortage_behind(wrapped) is error) is is_one
    if is_one:
        assert str(refused("a load", wrapped)) == "config.json cannot be read"
        with pytest.raises(Shortage, match="there was no memory for"), named("the tokenizer"):
            raise wrapped


def test_libraries_wrap_what_they_had_no_memory_for() -> None:
    def fail(last: Exception) -> None:
        try:
            try:
                raise OSError("libllvmlite.so: failed to map segment from shared object")
            except OSError:
                raise OSError("Could not find/load shared object file 'libllvmlite.so'")  # noqa: B904
        except OSError as error:
            raise last from error

    what = r"there was no memory for the libraries: libllvmlite\.so: failed to map segment"
    with pytest.raises(MemoryBudgetError, match=what), importing("the libraries"):
        fail(ImportError("numba cannot be imported"))
    with pytest.raises(ImportError, match="no such name"), importing("the libraries"):
        raise ImportError("no such name")
