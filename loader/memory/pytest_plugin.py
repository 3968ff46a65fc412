"""pytest plugin that comes with quantload: the `assert_load_memory` fixture.

Every test session of everybody who installed quantload imports this module, so it imports next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def assert_load_memory() -> Callable[..., None]:
    """`quantload.memory.assert_load_memory` as a fixture: (log or report, `peak_below=`, `increase_below=`)."""
    from .assertions import assert_load_memory as check

    return check
