"""Questions to a server at once, from threads that nobody has to wait for."""

from __future__ import annotations

import threading

import pytest
from quantload.checkpoint.crew import Stopped
from quantload.checkpoint.remote.side_by_side import side_by_side


def test_side_by_side_keeps_the_order_and_the_first_error() -> None:
    assert side_by_side(lambda item, _: item * 2, range(50), 4) == [item * 2 for item in range(50)]
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item, _: 1 // item, [1, 0, 1], 2)


def test_nobody_waits_for_a_server_that_says_nothing() -> None:
    said_nothing, stop = threading.Event(), threading.Event()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        side_by_side(lambda item, _: said_nothing.wait(30), [1], 1, stop.is_set)
    said_nothing.set()
