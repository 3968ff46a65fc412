"""Run a compiled function on torch's own threads.

torch keeps its OpenMP threads spinning between operations. A second pool beside it would fight with them for the same
cores, and lose; so work is handed to the pool that is there, through the runtime library torch has loaded already.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("quantload")
RUNTIMES = ("libgomp", "libiomp", "libomp")
"""File names of OpenMP runtimes; all of them offer `GOMP_parallel` on Linux."""
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def run(task: Any, data: int, threads: int) -> None:
    """Call the numba cfunc `task` with the address `data` on `threads` of torch's threads at once, and wait.

    On this thread alone where one is enough, or where torch's threads cannot be reached (logged once). The GIL is
    released meanwhile.
    """
    runner(task, threads)(data)


def runner(task: Any, threads: int) -> Callable[[int], object]:
    """`run` of a task on so many threads, to be called with the address alone; for a task that is run often."""
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        alone: Callable[[int], object] = _TASK(task.address)
        return alone
    address = task.address
    return lambda data: parallel(address, data, threads, 0)


@cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """The entry by which compilers start a parallel region, of the OpenMP runtime in this process."""
    path = _runtime()
    if path is None:
        logger.info("torch's OpenMP runtime was not found: quantized matmuls of a few tokens run on one thread")
        return None
    function: Any = ctypes.CDLL(str(path)).GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function  # type: ignore[no-any-return]


def _runtime() -> Path | None:
    """The OpenMP runtime this process has loaded, torch's own first."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or "OpenMP" not in torch.__config__.parallel_info():
        return None
    paths = {Path(line.split(maxsplit=5)[5].strip()) for line in maps.open() if "/" in line}
    loaded = sorted(path for path in paths if path.name.startswith(RUNTIMES))
    home = Path(torch.__file__).parent
    own = [path for path in loaded if home in path.parents or home.with_name("torch.libs") in path.parents]
    usable = [path for path in own or loaded if hasattr(ctypes.CDLL(str(path)), "GOMP_parallel")]
    return usable[0] if usable else None
