"""Options given by the environment: a name that is nearly that of one is most likely a mistake."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

logger = logging.getLogger("quantload")
PREFIX = "QUANTLOAD_"
"""What the names of environment variables begin with that give options."""


def warn_of_misspelt(commands: Iterable[Any]) -> None:
    """Warn of variables that no option of the commands has and that are spelt nearly like one that has."""
    known = {
        name
        for command in commands
        for parameter in command.params
        for name in ([parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ())
    }
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            meant = get_close_matches(name, known, 1, 0.85)
            if meant:
                logger.warning("%s is set, and no option is of that name: is %s meant?", name, meant[0])
