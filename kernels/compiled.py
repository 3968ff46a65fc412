"""Compile functions with numba once a process, from its disk cache where there is one.

What is compiled are closures over constants only: numba's disk cache keys closures by the values they close over, and
`FINGERPRINT` among them makes an upgrade of any kernel source miss the old entries (numba itself looks only at the
file that holds the function).
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numba as nb
from numba import types
from numba.extending import intrinsic

from .vector_ir import F32, F64, I8, I64, load_scalar, store_scalar

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


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


FINGERPRINT = _fingerprint()


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
read_i64, _ = _memory_access(I64, types.int64)


def jit(function: Callable[..., Any], signature: Any) -> KernelFunction:
    """A Python function that runs `function`, compiled for `signature`, without the GIL."""
    compiled: KernelFunction = _cached(lambda **options: nb.njit(signature, nogil=True, **options)(function))
    return compiled


def c_function(function: Callable[..., Any], signature: Any) -> CFunction:
    """A C function that runs `function`, compiled for `signature`."""
    compiled: CFunction = _cached(lambda **options: nb.cfunc(signature, **options)(function))
    return compiled


def _cached(compile_with: Callable[..., Any]) -> Any:
    options = {"boundscheck": False, "error_model": "numpy"}
    try:
        return compile_with(cache=True, **options)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        logger.info("numba has no folder to cache compiled kernels in, every process compiles them: %s", error)
    except (EOFError, pickle.UnpicklingError) as error:
        logger.warning("numba's disk cache is damaged (%s); delete it (NUMBA_CACHE_DIR, or __pycache__)", error)
    return compile_with(**options)


def locked(build: Callable[..., Made]) -> Callable[..., Made]:
    """Make and keep one function per argument tuple; threads that need one that is being made wait for it."""
    made: dict[tuple[Any, ...], Made] = {}

    def get(*key: Any) -> Made:
        function = made.get(key)
        if function is None:
            with _compiling:
                function = made.get(key)
                if function is None:
                    function = made[key] = build(*key)
        return function

    return get
