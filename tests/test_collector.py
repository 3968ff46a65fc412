"""The collector comes back as it was, whatever happens in between."""

from __future__ import annotations

import gc

import pytest
from quantload.collector import collector_paused


def test_it_is_off_inside_and_on_again_after_an_error() -> None:
    seen = []

    def fail() -> None:
        with collector_paused():
            seen.append(gc.isenabled())
            raise RuntimeError

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        fail()
    assert seen == [False]
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_made_inside_counts_as_old() -> None:
    with collector_paused():
        made = [[] for _ in range(3)]  # type: ignore[var-annotated]
    assert any(made is held for held in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen() -> None:
    made: list[int] = []
    gc.freeze()
    try:
        with collector_paused():
            pass
        assert gc.get_freeze_count() > 0
        assert not any(made is held for held in gc.get_objects())
    finally:
        gc.unfreeze()
