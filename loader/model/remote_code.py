"""Saying which code a checkpoint brings, before it runs with all the rights of this process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.small_files import read_json_object

logger = logging.getLogger("quantload")

_NAMING = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip
_MOST = 20


@functools.cache
def warn_of_code(root: Path, model_id: str) -> None:
    """Name, once for each folder, the code that runs because `trust_remote_code` is on; nothing where there is none."""
    code = code_of(root)
    if code:
        shown = ", ".join(code[:_MOST]) + (f" and {len(code) - _MOST} more" if len(code) > _MOST else "")
        logger.warning(
            "trust_remote_code is on: code that comes with %s may run with all rights of this process: %s",
            model_id, shown,
        )  # fmt: skip


def code_of(root: Path) -> list[str]:
    """The Python files of a checkpoint, and the repositories from which its configs name code."""
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.py"))
    named = {name for file in _NAMING for name in _references((read_json_object(root / file) or {}).get("auto_map"))}
    return files + sorted(f"code of {name.partition('--')[0]}" for name in named if "--" in name)


def _references(auto_map: Any) -> Iterator[str]:
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(value)
