"""What a process holds: anonymous memory, file pages, descriptors, threads; read from /proc, not from quantload."""

from __future__ import annotations

import os
import threading

MIB = 1 << 20


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A size of /proc/PID/status, such as `RssAnon`, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise LookupError(field)


def descriptors() -> dict[str, str]:
    """Open file descriptors and what they point to."""
    found: dict[str, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def threads() -> set[str]:
    """Names of the running Python threads."""
    return {f"{thread.name} {thread.ident}" for thread in threading.enumerate()}
