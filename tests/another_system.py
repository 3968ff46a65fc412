"""quantload as another system would run it: without the names that system lacks. Run as a program of its own.

    python another_system.py macos|windows FOLDER

Only the modules of quantload miss the names: what they import from others has its own code for other systems. Where
`windows` is asked for, no file that is open can be removed or renamed either. It loads the demo model, into a cache and
from it, converts and loads what was written, and serves it; it prints what came of that as one JSON object.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_ONLY_LINUX = {
    "os": (
        *("posix_fadvise", "posix_fallocate", "fdatasync", "sched_getaffinity", "sched_setaffinity", "RWF_NOWAIT"),
        *(f"POSIX_FADV_{name}" for name in ("DONTNEED", "NORMAL", "RANDOM", "SEQUENTIAL", "WILLNEED", "NOREUSE")),
        *("O_DIRECT", "O_PATH", "O_TMPFILE", "memfd_create", "pidfd_open", "copy_file_range", "eventfd"),
    ),
    "mmap": ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_DONTFORK", "MAP_POPULATE", "MAP_STACK", "MAP_NORESERVE"),
    "signal": ("SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGPOLL", "sigtimedwait", "sigwaitinfo", "pidfd_send_signal"),
    "resource": ("prlimit", "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_MSGQUEUE", "RLIMIT_OFILE"),
}
_ONLY_POSIX = {
    "os": (
        *("preadv", "pwritev", "pread", "pwrite", "readv", "writev", "fork", "forkpty", "register_at_fork", "sendfile"),
        *("getuid", "geteuid", "getgid", "getegid", "chown", "fchown", "lchown", "uname", "sysconf", "statvfs"),
        *("major", "minor", "mkfifo", "mknod", "nice", "killpg", "getpgid", "setsid", "wait", "wait3", "wait4"),
        *("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "O_SYNC", "O_DSYNC", "O_NOATIME", "posix_spawn"),
        *("lockf", "fchmod", "fchdir", "fdopendir", "sync", "getpriority", "set_blocking", "WNOHANG", "getloadavg"),
    ),
    "mmap": (
        *("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_ANON", "MAP_SHARED", "PROT_READ", "PROT_WRITE", "PROT_EXEC"),
        *("MADV_DONTNEED", "MADV_FREE", "MADV_NORMAL", "MADV_RANDOM", "MADV_SEQUENTIAL", "MADV_WILLNEED"),
    ),
    "signal": (
        *("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD", "SIGKILL", "SIGSTOP", "SIGCONT"),
        *("alarm", "setitimer", "pthread_sigmask", "pthread_kill", "sigwait", "siginterrupt", "pause"),
    ),
    "socket": ("AF_UNIX", "SO_REUSEPORT", "socketpair", "sendmsg"),
    "time": ("clock_gettime", "clock_settime", "pthread_getcpuclockid", "tzset"),
}
MISSING: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "macos": _ONLY_LINUX,
    "windows": {
        name: (*_ONLY_LINUX.get(name, ()), *_ONLY_POSIX.get(name, ())) for name in (*_ONLY_LINUX, *_ONLY_POSIX)
    },
}
ABSENT = {"macos": (), "windows": ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog")}
PLATFORM = {"macos": "darwin", "windows": "win32"}


class _Without(ModuleType):
    """A module of the standard library that lacks some names, and has others that are its own."""

    def __init__(self, module: ModuleType, missing: tuple[str, ...], **own: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(own)
        self._module, self._missing = module, frozenset(missing)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}: this system lacks it")
        return getattr(self._module, name)


def take_away(system: str) -> None:
    """From now on the modules of quantload see the standard library as `system` has it."""
    import mmap

    own: dict[str, dict[str, Any]] = {"sys": {"platform": PLATFORM[system]}}
    if system == "windows":
        own["mmap"] = {"mmap": _mapping(mmap)}
    seen: dict[str, ModuleType] = {
        name: _Without(importlib.import_module(name), MISSING[system].get(name, ()), **own.get(name, {}))
        for name in (*MISSING[system], "sys")
        if name not in ABSENT[system]
    }
    if system == "windows":
        seen["msvcrt"] = _msvcrt()
        _keep_open_files()
    imported, imported_module = builtins.__import__, importlib.import_module

    def checked(name: str) -> ModuleType | None:
        if name in ABSENT[system]:
            raise ModuleNotFoundError(f"No module named {name!r}: this system has none", name=name)
        return seen.get(name)

    def importing(name: str, globals: Any = None, *more: Any, **named: Any) -> Any:
        ours = str((globals or {}).get("__name__", "")).split(".")[0] == "quantload"
        return (checked(name) if ours else None) or imported(name, globals, *more, **named)

    def importing_module(name: str, package: str | None = None) -> ModuleType:
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        ours = caller.split(".")[0] == "quantload"
        return (checked(name) if ours else None) or imported_module(name, package)

    builtins.__import__ = importing
    importlib.import_module = importing_module


def _mapping(mmap: ModuleType) -> Callable[..., Any]:
    """`mmap.mmap` of Windows: without flags, and its mappings without `madvise`."""

    class Mapping(mmap.mmap):  # type: ignore[name-defined,misc]
        def __new__(cls, fd: int, length: int, tagname: str | None = None) -> Any:
            return super().__new__(cls, fd, length)

        def __getattribute__(self, name: str) -> Any:
            if name == "madvise":
                raise AttributeError(name)
            return super().__getattribute__(name)

    return Mapping


def _msvcrt() -> ModuleType:
    """Locks of bytes, as Windows has them, made of those of POSIX."""
    import fcntl

    module: Any = ModuleType("msvcrt")
    module.LK_NBLCK, module.LK_UNLCK = 2, 0

    def locking(fd: int, mode: int, nbytes: int) -> None:
        start = os.lseek(fd, 0, os.SEEK_CUR)
        kind = fcntl.LOCK_UN if mode == module.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(fd, kind, nbytes, start)
        except OSError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    module.locking = locking
    return module  # type: ignore[no-any-return]


def _keep_open_files() -> None:
    """Let nobody in this process remove or rename what it has open, nor rename onto what is there."""

    def guarded(call: Callable[..., Any], may_replace: bool) -> Callable[..., Any]:
        def guard(path: Any, *more: Any, **named: Any) -> Any:
            place = None if named.get("dir_fd") is not None else os.path.realpath(path)
            if place is not None and any(each == place or each.startswith(place + os.sep) for each in _open_files()):
                raise PermissionError(errno.EACCES, "the file is open in a process", place)
            if more and not may_replace and os.path.lexists(more[0]):
                raise FileExistsError(errno.EEXIST, "there is such a file already", str(more[0]))
            return call(path, *more, **named)

        return guard

    for name in ("unlink", "remove", "rename", "replace", "rmdir"):
        setattr(os, name, guarded(getattr(os, name), may_replace=name == "replace"))


def _open_files() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return found


def _results(folder: Path) -> dict[str, Any]:
    import quantload
    from quantload.cli import DEMO_MODEL
    from quantload.errors import PolicyError

    def load(path: Path, **options: Any) -> Any:
        return quantload.load_quantized(path, options=quantload.LoadOptions(digest=True, **options)).load_report

    found: dict[str, Any] = {
        "names": _names_there(),
        "loaded": load(DEMO_MODEL).digest,
        "dropped": load(DEMO_MODEL, page_cache="drop").digest,
    }
    try:
        reports = [load(DEMO_MODEL, cache=folder / "cache") for _ in range(2)]
        found["cached"] = [(report.cache, report.digest) for report in reports]
    except PolicyError as error:
        found["cached"] = str(error)
    quantload.convert_checkpoint(DEMO_MODEL, folder / "out", "quark_mxfp4")
    found["converted"] = load(folder / "out").digest
    found["left"] = sorted(path.name for path in folder.iterdir())
    found["served"] = _served(folder / "out")
    return found


def _names_there() -> list[str]:
    """Names that were taken away and that the module which is about them sees all the same."""
    from quantload.kernels import system_calls

    return [name for name in _ONLY_LINUX["os"] if hasattr(vars(system_calls)["os"], name)]


def _served(path: Path) -> list[Any]:
    """The statuses of health and of a completion, and its text."""
    import threading

    from quantload.options import LoadOptions
    from quantload.server.command import serve_model
    from server_harness import Client, wait_for

    port = _free_port()
    end = threading.Event()
    said: list[Any] = []

    def ask() -> None:
        client = Client(port)

        def ready() -> bool:
            try:
                return bool(client.get("/health").status == 200)
            except OSError:
                return False

        try:
            wait_for(ready, 60)
            reply = client.post("/v1/completions", {"prompt": "def f(", "max_tokens": 4, "temperature": 0})
            said.extend([reply.status, reply.json["choices"][0]["text"]])
        finally:
            end.set()
            import _thread

            _thread.interrupt_main()

    threading.Thread(target=ask, daemon=True).start()
    serve_model(
        path, "auto", device="cpu", policy=None, options=LoadOptions(), revision=None, trust_remote_code=False,
        host="127.0.0.1", port=port, api_key=None, served_model_name="demo", continuous_batching=False,
    )  # fmt: skip
    assert end.is_set()
    return said


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    import fastapi  # noqa: F401
    import numba  # noqa: F401
    import psutil  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import uvicorn  # noqa: F401

    sys.modules["triton"] = None  # type: ignore[assignment]  # it is for Linux only
    take_away(sys.argv[1])
    print(json.dumps(_results(Path(sys.argv[2]))))
