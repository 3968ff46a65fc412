"""Compile kernels before they are called; what the disk cache does not have, in a process of its own.

What numba and LLVM took to compile a function, 9 to 16 MiB, nine tenths of it stays with the process: LLVM's modules
belong to the compiler that holds the machine code, and neither the collector nor `malloc_trim` gets them back. So
another process compiles, puts the machine code into numba's disk cache, and ends; from there a function takes less than
one MiB. That process imports numba and what kernels are generated from, not torch.

Run with `-m` this module is that process. Its argument is JSON, a list of [module, builder, arguments].
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .compiled import COMPILE_MIB, Needed

logger = logging.getLogger("quantload")
LIMIT_SECONDS = 600.0
"""When a process that compiles is given up: hundreds of times what it takes."""
_one_at_a_time = threading.Lock()


def prepare(functions: Iterable[Needed[Any]]) -> None:
    """Compile functions, or fetch them from the disk cache.

    Where no other process can compile for this one, or did not, this one does, and says so.
    """
    wanted = list(dict.fromkeys(functions))
    with _one_at_a_time:
        missing = [function for function in wanted if function.is_missing()]
        if missing:
            _compile_elsewhere(missing)
        for function in wanted:
            function.get()


def _compile_elsewhere(missing: Sequence[Needed[Any]]) -> None:
    start, reason = time.perf_counter(), "another process did not leave them in the disk cache of this one"
    try:
        _run_child([_described(function) for function in missing])
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    left = sum(function.is_missing() for function in missing)
    if left:
        logger.warning(
            "%d CPU kernels are compiled in this process, which takes about %d MiB of it for each: %s",
            left,
            COMPILE_MIB,
            reason,
        )
    else:
        seconds = time.perf_counter() - start
        logger.info("Compiled %d CPU kernels in %.1f s, for this and later processes", len(missing), seconds)


def _described(function: Needed[Any]) -> tuple[str, str, tuple[Any, ...]]:
    build = function.compiled.build
    return build.__module__, build.__name__, function.key


def _run_child(described: list[tuple[str, str, tuple[Any, ...]]]) -> None:
    """Compile in a process of its own; OSError and SubprocessError say why that went wrong."""
    # The child finds what this process finds; -P keeps it from looking into the working directory on its own account.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [_interpreter(), "-P", "-m", __name__, json.dumps(described)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    child = subprocess.run(command, env=environment, timeout=LIMIT_SECONDS, check=False, **streams)  # type: ignore[call-overload]
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise subprocess.SubprocessError(f"another process ended with code {child.returncode}: {last or 'no message'}")


def _interpreter() -> str:
    """The Python that runs this process; OSError where its executable may be something else."""
    name = Path(sys.executable or "").name.lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise OSError(f"sys.executable is {sys.executable!r}, which need not be a Python interpreter")
    return sys.executable


def main() -> None:
    """Compile what the argument lists; first what no other process is compiling, so that several share the work."""
    recipes = [getattr(import_module(module), builder)(*key) for module, builder, key in json.loads(sys.argv[1])]
    for recipe in [recipe for recipe in recipes if not recipe.compile_unless_another_does()]:
        recipe.compile()


if __name__ == "__main__":
    main()
