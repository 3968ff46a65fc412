"""A server's log is one kind of line, whoever writes it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from quantload.cli.logs import OTHERS, log_as_json, quiet_libraries, set_up_logging, set_up_server_logging


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("quantload", "uvicorn.error", *OTHERS)]
    before = [([*logger.handlers], logger.level, logger.propagate) for logger in loggers]
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)  # where a server of another test has left one
    yield
    logging.captureWarnings(False)
    enable_progress_bars()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is on standard error after everybody said something."""
    for name in ("quantload", "quantload.requests", "uvicorn.error", "transformers.models.x", "asyncio"):
        logging.getLogger(name).info("quiet")
        logging.getLogger(name).warning("loud")
    logging.getLogger("uvicorn.error").error("crash\nof two lines", exc_info=ValueError("x"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    return capsys.readouterr().err.splitlines()


def test_every_json_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    set_up_server_logging(form="json")
    assert log_as_json()
    assert are_progress_bars_disabled()
    lines = [json.loads(line) for line in written(capsys)]
    assert [(line["logger"], line["level"], line["message"]) for line in lines[:7]] == [
        ("quantload", "info", "quiet"),
        ("quantload", "warning", "loud"),
        ("quantload.requests", "info", "quiet"),
        ("quantload.requests", "warning", "loud"),
        ("uvicorn.error", "warning", "loud"),
        ("transformers.models.x", "warning", "loud"),
        ("asyncio", "warning", "loud"),
    ]
    assert lines[7]["exception"] == "ValueError: x"
    assert "DeprecationWarning: old" in lines[8]["message"]
    assert len(lines) == 9


def test_every_text_line_begins_with_a_time_a_level_and_a_logger(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_server_logging()
    lines = written(capsys)
    stamped = [
        line for line in lines if re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) \S+: ", line)
    ]
    assert len(stamped) == 9
    assert not log_as_json()


def test_only_errors_when_it_is_to_be_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_server_logging("error", "json")
    assert [json.loads(line)["level"] for line in written(capsys)] == ["error"]


def test_a_command_that_does_not_serve_has_its_lines_bare(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_server_logging()
    set_up_logging()
    logging.getLogger("quantload").info("Loaded 1.00 GiB in 1.0 s (1.00 GiB/s)")
    assert capsys.readouterr().err == "Loaded 1.00 GiB in 1.0 s (1.00 GiB/s)\n"


def test_libraries_warn_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(verbose: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_libraries(verbose)
            warnings.warn("of a library", UserWarning, stacklevel=1)
        return [str(each.message) for each in caught]

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    assert warned(True) == ["of a library"]
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    assert warned(False) == []
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert warned(False) == ["of a library"]
