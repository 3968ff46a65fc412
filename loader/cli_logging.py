"""What the command line does with log lines: how many, in which form, above a progress bar."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal

from rich.console import Console

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

console = Console(stderr=True)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03}Z", "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _ConsoleHandler(logging.Handler):
    """Prints log lines above a progress bar, never wrapped: programs read them."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)


def set_up_logging(level: LogLevel = "info", form: LogFormat = "text") -> None:
    """Print the package's log lines from `level` up on standard error; a second call replaces the first."""
    logger = logging.getLogger("quantload")
    logger.setLevel(level.upper())
    handler = next((each for each in logger.handlers if isinstance(each, _ConsoleHandler)), None)
    if handler is None:
        handler = _ConsoleHandler()
        logger.addHandler(handler)
    handler.setFormatter(_JsonFormatter() if form == "json" else None)
