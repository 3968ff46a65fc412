"""A pytest plugin: tests that have not begun when the time is up are left out, and said to be."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest

REASON = "left out, the time is up"
_left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seconds-left N`: from the start of the run, its processes and imports included."""
    parser.addoption("--seconds-left", type=float, default=math.inf)


def pytest_configure(config: pytest.Config) -> None:
    """The moment is fixed by the process that starts the others, which get it as an option."""
    seconds = config.getoption("--seconds-left")
    until = getattr(config, "workerinput", {}).get("until", time.time() + seconds)
    config.stash[_UNTIL] = until


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell a process of pytest-xdist the moment."""
    node.workerinput["until"] = node.config.stash[_UNTIL]  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before anything is set up for the test."""
    if time.time() > item.config.stash[_UNTIL]:
        pytest.skip(REASON)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what was left out, by file."""
    if report.skipped and isinstance(report.longrepr, tuple) and REASON in report.longrepr[2]:
        _left_out[report.nodeid.split("::")[0]] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, last."""
    for name, count in _left_out.items():
        terminalreporter.write_line(f"left out for lack of time: {count} of {name}")


_UNTIL = pytest.StashKey[float]()
