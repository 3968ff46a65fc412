"""One reload of a model at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import PolicyError
from .settings import LoadSettings

_reloading: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def settings_of(model: Any) -> LoadSettings:
    """What is remembered of a model's load; raises `PolicyError` where nothing is."""
    settings = getattr(model, "load_settings", None)
    if not isinstance(settings, LoadSettings):
        raise PolicyError(
            f"{type(model).__name__} does not say how it was loaded; give the model that load_quantized returned, "
            f"without what was put around it"
        )
    return settings


@contextmanager
def alone(model: Any) -> Iterator[LoadSettings]:
    """What is remembered of a model's load, while nobody else reloads it; raises `PolicyError` where somebody does."""
    settings = settings_of(model)
    with _lock:
        if model in _reloading:
            raise PolicyError("the model is being reloaded already; wait until that is finished")
        _reloading.add(model)
    try:
        yield settings
    finally:
        with _lock:
            _reloading.discard(model)
