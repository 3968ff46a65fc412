"""Compile kernels before they are called; what the disk cache does not have, in a process of its own.

What numba and LLVM took to compile a function, 9 to 16 MiB, nine tenths of it stays with the process: LLVM's modules
belong to the compiler that holds the machine code, and neither the collector nor `malloc_trim` gets them back. So
another process compiles, puts the machine code into numba's disk cache, and ends; from there a function takes less than
one MiB. That process imports numba and what kernels are generated from, not torch.

Run with `-m` this module is that process. Its argument is JSON, a list of [module, builder, arguments]. What it logs as
INFO goes to standard error, for the process that waits for it to log.
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
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from numba import config

from .compiled import COMPILE_MIB, Needed

logger = logging.getLogger("quantload")
LIMIT_SECONDS = 600.0
"""When a process that compiles is given up: hundreds of times what it takes."""
_one_at_a_time = threading.Lock()
_INFO = "INFO: "
"""What a line of the process that compiles begins with if it is for the log."""


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
    if config.CACHE_DIR:  # which a program may have set without the environment
        environment["NUMBA_CACHE_DIR"] = config.CACHE_DIR
    command = [_interpreter(), "-P", "-m", __name__, json.dumps(described)]
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    with (
        subprocess.Popen(
            command, env=environment, stdin=null, stdout=null, stderr=pipe, text=True, errors="replace"
        ) as child,
        ThreadPoolExecutor(1) as pool,
    ):
        assert child.stderr is not None
        last = pool.submit(_relay, child.stderr)
        try:
            code = child.wait(LIMIT_SECONDS)
        except BaseException:  # an interruption, too: nobody waits for it any more
            child.kill()
            raise
        said = last.result()
    if code:
        raise subprocess.SubprocessError(f"another process ended with code {code}: {said or 'no message'}")


def _relay(lines: IO[str]) -> str:
    """Log what is meant for the log; the last of the other lines says what went wrong, if anything did."""
    last = ""
    for line in lines:
        if line.startswith(_INFO):
            logger.info(line.removeprefix(_INFO).rstrip())
        else:
            last = line.strip() or last
    return last


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


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    _log_to_stderr()
    main()
