"""The `quantload` program: the command line in a process of its own, which ends at once."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

from .commands import main


def program() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    try:
        main()
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            raise
        code = ended.code or 0
    else:
        code = 0
    if "torch" in sys.modules:
        end_process(code)
    sys.exit(code)


def end_process(code: int) -> None:
    """End this process as Python would, but for taking apart all that is in memory; that is left to the system.

    With torch and transformers imported, Python takes a second for it: it looks for cycles among all their objects, and
    frees each. What is registered with `atexit` runs, and the standard streams are flushed. Returns where somebody has
    more to do: threads that are waited for, a profiler or debugger, a stream that takes nothing any more.
    """
    if _is_watched() or any(not thread.daemon for thread in _other_threads()):
        return
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # Python says so, and has an exit code for it
    os._exit(code)


def _other_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.current_thread()]


def _is_watched() -> bool:
    """Whether a profiler, a debugger or the like follows what Python does."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = [] if monitoring is None else [monitoring.get_tool(number) for number in range(6)]
    return sys.gettrace() is not None or sys.getprofile() is not None or any(tools)
