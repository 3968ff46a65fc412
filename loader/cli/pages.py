"""What the command line writes as a page, and the command in it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..addresses import without_credentials
from ..errors import QuantloadError

SECRETS = ("--api-key",)
"""Options whose values are shown to nobody."""
HIDDEN = "KEY"
"""What stands in their places: a word that a shell takes as it is."""


def typed() -> str:
    """What was typed, as a shell takes it, without what may let somebody in."""
    shown, before = ["quantload"], ""
    for argument in sys.argv[1:]:
        option, given, _ = argument.partition("=")
        if before in SECRETS:
            shown.append(HIDDEN)
        elif option in SECRETS and given:
            shown.append(f"{option}={HIDDEN}")
        else:
            shown.append(without_credentials(argument))
        before = argument
    return shlex.join(shown)


def write_page(page: str, path: Path) -> None:
    """Write a page where it was asked for; raises `QuantloadError`."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise QuantloadError(f"{path} cannot be written: {error.strerror}; all the rest was done") from error


def write_report_page(report: Mapping[str, Any], path: Path | None) -> None:
    """Write the page of a load that came to its end, unless `path` is None."""
    if path is not None:
        from ..page.document import report_page

        write_page(report_page(report), path)
