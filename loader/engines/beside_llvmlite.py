"""vLLM's worker and llvmlite in one process."""

from __future__ import annotations

import sys
from typing import Any


def let_llvmlite_be_looked_at() -> None:
    """Keep vLLM's worker from ending at llvmlite, where that is imported.

    The worker asks every module it finds for `vars(module).get`. llvmlite has an object among its modules that makes a
    function of whatever it is asked for, `__dict__` included, which `vars` then gets.
    """
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    functions = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})
