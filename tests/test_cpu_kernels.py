"""What the environment may say about numba."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from quantload.cpu_kernels import import_cpu_kernels
from quantload.errors import PolicyError


@pytest.mark.parametrize("given", ["0", "-2", " 0 "])
def test_a_number_of_threads_that_numba_does_not_take(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", given)
    with pytest.raises(PolicyError, match=f"NUMBA_NUM_THREADS is '{given}' .*1 or more: set it so, or unset it"):
        import_cpu_kernels()


@pytest.mark.parametrize("given", ["1", "", "many"])
def test_others_are_numbas_to_judge(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", given)
    import_cpu_kernels()


@pytest.mark.slow
def test_the_command_says_so_and_ends_with_2() -> None:
    command = [sys.executable, "-m", "quantload", "plan"]
    done = subprocess.run(command, env={**os.environ, "NUMBA_NUM_THREADS": "0"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: NUMBA_NUM_THREADS is '0'")
    assert "Traceback" not in done.stderr
