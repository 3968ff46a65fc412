"""The plain torch operations of a format, by its name."""

from __future__ import annotations

import importlib
from functools import cache

from ..formats import FORMATS
from .operations import Reference


@cache
def reference(format_name: str, scale_mode: str = "default") -> Reference:
    """All operations of a format."""
    fmt = FORMATS[format_name]
    assert fmt.family is not None
    module, _, attribute = fmt.family.reference.partition(":")
    found: Reference = getattr(importlib.import_module(f".{module}", __package__), attribute)(fmt, scale_mode)
    return found
