"""What the command line does with log lines: how many, in which form, above a progress bar."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from typing import Literal, TextIO

from rich.console import Console

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
OTHERS = ("uvicorn", "transformers", "huggingface_hub", "asyncio", "py.warnings")

console = Console(stderr=True)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and `exception` if there is one.

    What a record has as `fields`, a mapping, comes behind them.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _stamp(record), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _StampedFormatter(logging.Formatter):
    """`2026-11-29T08:30:00.123Z INFO quantload: message`, in UTC."""

    def __init__(self) -> None:
        super().__init__("%(stamp)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.stamp = _stamp(record)
        return super().formatMessage(record)


def _stamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"


class _ConsoleHandler(logging.Handler):
    """Prints log lines above a progress bar, never wrapped: programs read them."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)


class _ServerHandler(logging.StreamHandler[TextIO]):
    """Prints log lines, and nothing else there is to print."""


def set_up_logging(level: LogLevel = "info", form: LogFormat = "text") -> None:
    """Print the package's log lines from `level` up on standard error; a second call replaces the first."""
    handler = _ConsoleHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else None)
    _hand_to("quantload", handler, level)


def quiet_libraries(verbose: bool) -> None:
    """Show no warnings of the libraries that are imported from now on, unless `verbose`, or the user has said so.

    What Python's `-W` or PYTHONWARNINGS say counts, as does TRANSFORMERS_VERBOSITY.
    """
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


def set_up_server_logging(level: LogLevel = "info", form: LogFormat = "text") -> None:
    """As `set_up_logging`, for a process that only logs: with times and levels, and others' lines in the same form.

    Others are uvicorn, transformers, the hub's client, asyncio and Python's own warnings, all from WARNING up. Call it
    after they were imported: some set up their loggers then.
    """
    handler = _ServerHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _StampedFormatter())
    _hand_to("quantload", handler, level)
    least: LogLevel = "error" if level == "error" else "warning"
    for name in OTHERS:
        _hand_to(name, handler, least)
    logging.captureWarnings(True)
    if form == "json":
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def log_as_json() -> bool:
    """Whether what the program says last, such as the error that ends it, goes to the log as JSON too."""
    return any(isinstance(each.formatter, _JsonFormatter) for each in logging.getLogger("quantload").handlers)


def _hand_to(name: str, handler: logging.Handler, level: LogLevel) -> None:
    """Make `handler` the one that prints a logger's lines, in place of an earlier one of these or the library's own."""
    logger = logging.getLogger(name)
    logger.setLevel(level.upper())
    for each in [*logger.handlers]:
        if name in OTHERS or isinstance(each, (_ConsoleHandler, _ServerHandler)):
            logger.removeHandler(each)
    logger.addHandler(handler)
