"""Numba and the kernels that are compiled with it: imported with the package, not in the middle of the first load."""

from __future__ import annotations

import os
from importlib import import_module

from .errors import PolicyError

_THREADS = "NUMBA_NUM_THREADS"


def import_cpu_kernels() -> None:
    """Import them; raises `PolicyError` for a number of threads in the environment that numba does not start with."""
    given = os.environ.get(_THREADS, "")
    if given.strip().lstrip("+-").isdigit() and int(given) < 1:
        raise PolicyError(
            f"{_THREADS} is {given!r} in the environment; numba takes 1 or more: set it so, or unset it, which means "
            f"one thread a core"
        )
    import_module(".kernels.cpu.choose", __package__)
