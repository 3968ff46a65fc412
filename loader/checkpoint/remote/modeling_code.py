"""Which files of modeling code belong to a checkpoint, where a server does not say which files it has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..small_files import MAX_CODE_BYTES, read_json_object, read_small_file

_NAMED_BY = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_CLASS = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*")
_IMPORT = re.compile(r"^\s*from\s+\.([A-Za-z_]\w*)?\s+import\s+([\w, ]+)", re.MULTILINE)
_MOST = 64
"""Files of code; no checkpoint has as many."""


def modeling_code(root: Path) -> list[str]:
    """The names of the modules that the configs in a folder name in `auto_map`, and of those that modules there import
    from beside them, as far as they are there."""
    found: dict[str, None] = {}
    waiting = [name for config in _NAMED_BY for name in _named(root / config)]
    while waiting and len(found) < _MOST:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            waiting += _imported(root / name)
    return list(found)


def _named(config: Path) -> Iterator[str]:
    """Classes of a config, `module.Class`; those of other repositories have `--` before it."""
    try:
        said = read_json_object(config) or {}
    except CheckpointError:
        return  # which is for who reads it to say
    for match in _CLASS.finditer(json.dumps(_flat(said.get("auto_map")))):
        yield f"{match[1]}.py"


def _flat(auto_map: Any) -> list[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    flat = (each for value in values for each in (value if isinstance(value, list) else [value]))
    return [each for each in flat if isinstance(each, str) and "--" not in each]


def _imported(module: Path) -> Iterator[str]:
    """Modules that a module imports from beside it, if it is there."""
    code = read_small_file(module, MAX_CODE_BYTES) or b""
    for match in _IMPORT.finditer(code.decode("utf-8", "replace")):
        for name in [match[1]] if match[1] else match[2].split(","):
            yield f"{name.strip().split(' ')[0]}.py"
