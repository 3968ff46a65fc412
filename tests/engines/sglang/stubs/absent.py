"""What a library that is not there is made of: any name of it can be imported, and nothing of it be called."""

from collections.abc import Callable
from typing import Any


def absent(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{module}.{name} was called, which this stand-in does not have")

        missing.__name__ = name
        return missing

    return get
