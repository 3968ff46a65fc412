"""Fixtures every folder of tests may use."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: no test may reach the network
# Read when torch is imported, in child processes too: threads that have nothing to do give way to other processes of
# the run, instead of keeping a core busy until there is something.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell starts what runs in its background with SIGINT ignored, which child processes inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from gpu_kernel_table import TABLE

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    """Imported by the processes that run tests only: they do not start before the one that starts them has got here."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


LOGGERS = [logging.getLogger(name) for name in ("quantload", "transformers", "uvicorn", "uvicorn.error", "py.warnings")]


@pytest.fixture(autouse=True)
def _loggers_as_before(_quiet_transformers: None) -> Iterator[None]:
    """Commands that run in the process of a test set loggers up as they do in a process of their own."""
    before = [(logger.level, logger.propagate, [*logger.handlers]) for logger in LOGGERS]
    yield
    for logger, (level, propagate, handlers) in zip(LOGGERS, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint of an architecture, built when first asked for. Tests must not write to it."""
    import architectures

    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            architectures.save(architectures.BY_NAME[name], path)
        return path

    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the checkpoints written by the reference tools."""
    return DATA / "golden"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its part of the table over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_kernels"] = TABLE.record()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended; one that crashed has handed nothing over."""
    if "gpu_kernels" in getattr(node, "workeroutput", {}):
        TABLE.merge(node.workeroutput["gpu_kernels"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One table of every GPU kernel that was compiled or interpreted in this run."""
    lines = TABLE.lines()
    if lines:
        terminalreporter.section("GPU kernels")
        for line in lines:
            terminalreporter.write_line(line)
