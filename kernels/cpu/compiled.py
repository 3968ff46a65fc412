"""Compile functions with numba once a process, from its disk cache where there is one.

What is compiled are closures over constants only: numba's disk cache keys closures by the values they close over, and
`FINGERPRINT` among them makes an upgrade of any kernel source miss the old entries (numba itself looks only at the
file that holds the function).

Every closure has files of its own in that cache. numba numbers those of all closures of one function in a shared index
without a lock, so that two processes may give one number to two of them, and the next process would get the machine
code of the one for the other.

Equal texts in a closure are one object: numba's key is a pickle, which says of an object that it was there before, and
the texts that a builder is given in one process may be its own constants, in another they may come from JSON.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numba as nb
from numba import types
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from . import cache_folder
from .compile_lock import CompileLock
from .ir.vector import F32, F64, I8, load_scalar, store_scalar

logger = logging.getLogger("quantload")
_compiling = threading.RLock()
KernelFunction = Callable[..., int]
Made = TypeVar("Made")


class CFunction(Protocol):
    """A C function in this process: `address` for compiled code, `ctypes` for Python, which releases the GIL."""

    @property
    def address(self) -> int: ...
    @property
    def ctypes(self) -> Callable[..., int]: ...


def sources() -> list[Path]:
    """The files that machine code depends on: an edit of any of them makes what was compiled before obsolete."""
    here = Path(__file__).parent
    return sorted([*here.rglob("*.py"), *here.parent.glob("*.py")])


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


FINGERPRINT = _fingerprint()
cache_folder.register(FINGERPRINT)


def _memory_access(element: Any, numba_type: Any) -> tuple[Any, Any]:
    def read(typing: Any, address: Any) -> Any:
        """The scalar at an address."""
        return numba_type(address), lambda context, b, signature, args: load_scalar(b, args[0], element)

    def write(typing: Any, address: Any, value: Any) -> Any:
        """Store a scalar at an address."""

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            store_scalar(b, args[1], args[0])
            return context.get_dummy_value()

        return types.void(address, numba_type), codegen

    return intrinsic(read), intrinsic(write)


read_u8, write_u8 = _memory_access(I8, types.uint8)
read_f32, write_f32 = _memory_access(F32, types.float32)
read_f64, write_f64 = _memory_access(F64, types.float64)


@dataclass(frozen=True)
class Recipe(Generic[Made]):
    """A closure over constants, and how numba compiles it for a signature."""

    function: Callable[..., Any]
    signature: Any
    decorator: Callable[..., Any]

    def compile(self) -> Made:
        """The compiled function: from the disk cache, or put there; what another process compiles is waited for."""
        if not self.is_missing():
            return self._compile()
        with CompileLock(self._lock_path()) as lock:
            lock.wait()
            return self._compile()

    def compile_unless_another_does(self) -> bool:
        """Put the compiled function into the disk cache; False where another process is doing it."""
        if not self.is_missing():
            return True
        with CompileLock(self._lock_path()) as lock:
            if lock.take():
                self._compile()
                return True
        return False

    def _lock_path(self) -> str:
        return str(FunctionCache(self.function)._cache_file._index_path) + ".lock"

    def _compile(self) -> Made:
        options = {"boundscheck": False, "error_model": "numpy"}
        made: Made
        try:
            made = self.decorator(cache=True, **options)(self.function)
            return made
        except RuntimeError as error:
            if not _has_no_folder(error):
                raise
            _say_no_folder(str(error))
        except DAMAGED as error:
            folder = FunctionCache(self.function).cache_path
            logger.warning("numba's disk cache is damaged (%s); delete the folder %s", error, folder)
        except OSError as error:  # the disk is full, or a file may not be so large
            folder = FunctionCache(self.function).cache_path
            logger.warning("a compiled kernel cannot be kept in %s: %s", folder, error.strerror or error)
        made = self.decorator(**options)(self.function)
        return made

    def is_missing(self) -> bool:
        """Whether the disk cache could hold the compiled function and does not."""
        try:
            entries = FunctionCache(self.function)
            key = entries._index_key(self.signature, cpu_target.target_context.codegen())
            return entries._cache_file.load(key) is None
        except RuntimeError as error:
            if not _has_no_folder(error):
                raise
        except DAMAGED:
            pass  # `compile` says it
        return False


DAMAGED = EOFError, pickle.UnpicklingError
"""What numba raises for files of its disk cache that were cut off."""


def _has_no_folder(error: RuntimeError) -> bool:
    return cache_folder.NO_FOLDER in str(error)


_said: list[str] = []


def _say_no_folder(error: str) -> None:
    """Once a process: it holds for all kernels."""
    if not _said:
        _said.append(error)
        logger.warning(
            "there is no folder to keep compiled kernels in (%s): every process compiles them, which takes seconds, "
            "and about %d MiB of memory for each; let XDG_CACHE_HOME or NUMBA_CACHE_DIR name a folder",
            error,
            COMPILE_MIB,
        )


COMPILE_MIB = 15
"""About what compiling a kernel takes from the process that does it, for good."""


def jit(function: Callable[..., Any], signature: Any) -> Recipe[KernelFunction]:
    """How to compile `function`, which then runs without the GIL."""
    return Recipe(_with_own_files(function, signature), signature, partial(nb.njit, signature, nogil=True))


def c_function(function: Callable[..., Any], signature: Any) -> Recipe[CFunction]:
    """How to compile `function` to a C function."""
    return Recipe(_with_own_files(function, signature), signature, partial(nb.cfunc, signature))


def _with_own_files(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """`function` by a name, which numba makes file names of, that says what it closes over and the processor."""
    for cell in function.__closure__ or ():
        cell.cell_contents = _with_one_object_for_equal_texts(cell.cell_contents)
    constants = [cell.cell_contents for cell in function.__closure__ or ()]
    identity = repr((signature, cpu_target.target_context.codegen().magic_tuple(), constants))
    function.__qualname__ += f".{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    return function


def _with_one_object_for_equal_texts(constant: Any) -> Any:
    if type(constant) is str:
        return sys.intern(constant)
    if type(constant) is tuple:
        return tuple(map(_with_one_object_for_equal_texts, constant))
    return constant


class Compiled(Generic[Made]):
    """The functions that a builder gives recipes for, by its arguments: each made when it is first asked for, and kept.

    Threads that need one that is being made wait for it.
    """

    def __init__(self, build: Callable[..., Recipe[Made]]) -> None:
        self.build = build
        self._made: dict[tuple[Any, ...], Made] = {}

    def __call__(self, *key: Any) -> Made:
        function = self._made.get(key)
        if function is None:
            with _compiling:
                function = self._made.get(key)
                if function is None:
                    function = self._made[key] = self.build(*key).compile()
        return function

    def needed(self, *key: Any) -> Needed[Made]:
        """The function of these arguments, for later."""
        return Needed(self, key)

    def is_missing(self, *key: Any) -> bool:
        """Whether a function is not made yet, and not in the disk cache either although there is one."""
        return key not in self._made and self.build(*key).is_missing()


@dataclass(frozen=True)
class Needed(Generic[Made]):
    """A function that will be called, whether it is compiled or not: the arguments of its builder, text and numbers."""

    compiled: Compiled[Made]
    key: tuple[Any, ...]

    def get(self) -> Made:
        """The function; compiled now, or fetched from the disk cache, if it was not before."""
        return self.compiled(*self.key)

    def is_missing(self) -> bool:
        """Whether it has to be compiled, and the disk cache can hold it then."""
        return self.compiled.is_missing(*self.key)
