"""How the process of the command line ends: at once, and with nothing of what Python does at its end left out."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys

import pytest
from quantload.cli.process import end_process

BEFORE = """
import atexit, sys, threading, types
sys.argv = ["quantload", *sys.argv[1:]]
from quantload.cli import program
sys.modules["torch"] = types.ModuleType("torch")  # what takes long to take apart is imported
class Seen:
    def __del__(self): print("taken apart")
kept = Seen()
print("no end of line", end="")
"""


def run(code: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of Python code, with the command line ready."""
    done = subprocess.run(
        [sys.executable, "-c", f"{BEFORE}{code}", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["load", "--workers", "few"], 2)])
def test_nothing_is_taken_apart_after_what_python_does_at_the_end(arguments: list[str], code: int) -> None:
    ended, out, err = run("atexit.register(print, 'at exit')\nprogram()", *arguments)
    assert ended == code
    assert out.startswith("no end of line")
    assert out.endswith("at exit\n")
    assert ("--workers" in err) == (code == 2)


def test_python_ends_the_process_where_a_thread_is_waited_for() -> None:
    waits = "lambda: (threading.main_thread().join(), print('waited for'))"
    code, out, err = run(f"threading.Thread(target={waits}).start()\nprogram()", "--version")
    assert (code, err) == (0, "")
    assert "waited for" in out
    assert "taken apart" in out


def test_a_profiler_gets_to_write_down_what_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: ended.append("at exit"))
    before = sys.getprofile()
    sys.setprofile(lambda *_: None)
    try:
        end_process(0)
    finally:
        sys.setprofile(before)
    assert ended == []


def test_an_unexpected_error_is_told_as_python_tells_it() -> None:
    code, out, err = run("import quantload.cli.process as p\np.main = lambda: 1 // 0\nprogram()")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "taken apart" in out


def test_a_full_disk_is_told_by_its_exit_code() -> None:
    code, _, err = run("import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprogram()", "--version")
    assert code != 0
    assert "No space left on device" in err
