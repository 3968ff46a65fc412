"""The plain torch operations of a format, by its name."""

from __future__ import annotations

import importlib
from functools import cache

from ..formats import FORMATS
from .operations import Reading, Reference


@cache
def reading(format_name: str, scale_mode: str = "default") -> Reading:
    """The operations of a format: those of `Reference`, or only those of `Reading`."""
    fmt = FORMATS[format_name]
    assert fmt.family is not None
    module, _, attribute = fmt.family.reference.partition(":")
    found: Reading = getattr(importlib.import_module(f".{module}", __package__), attribute)(fmt, scale_mode)
    return found


def reference(format_name: str, scale_mode: str = "default") -> Reference:
    """All operations of a format that weights can be quantized to; `ValueError` for one that is only read."""
    found = reading(format_name, scale_mode)
    if not isinstance(found, Reference):
        raise ValueError(f"{format_name} is only read")
    return found
