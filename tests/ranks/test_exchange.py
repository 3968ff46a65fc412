"""Maxima are exchanged in one order on every rank, whatever the order in which readers come with them."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest
import torch
from quantload.checkpoint.crew import Crew
from quantload.errors import LoadCancelledError, RankError
from quantload.ranks.exchange import MaximaExchange
from torch import Tensor


class Recorded(MaximaExchange):
    """Notes what it would send, and raises everything to at least 5."""

    def __init__(self) -> None:
        super().__init__(cast(Any, None))
        self.sent: list[list[float]] = []

    def _reduce(self, flat: Tensor) -> None:
        self.sent.append(flat.tolist())
        flat.clamp_(min=5)


def maxima(*values: float) -> list[Tensor]:
    return [torch.tensor([[value]]) for value in values]


def test_readers_wait_for_their_turns() -> None:
    exchange = Recorded()
    exchange.expect(["a", "b", "c"])
    threads = [threading.Thread(target=exchange, args=(key, maxima(value))) for value, key in enumerate("cab")]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert exchange.sent == [[1.0], [2.0], [0.0]]


def test_all_maxima_of_a_matrix_are_raised_in_their_places() -> None:
    exchange = Recorded()
    exchange.expect(["a"])
    given = [torch.tensor([[1.0, 7.0]]), torch.tensor([[9.0], [2.0]])]
    exchange("a", given)
    assert [each.tolist() for each in given] == [[[5.0, 7.0]], [[9.0], [5.0]]]


def test_what_no_load_expects_cannot_be_exchanged() -> None:
    with pytest.raises(RankError, match=r"outside of a load: .* on all ranks at once"):
        Recorded()("a", maxima(1.0))


def test_a_reader_leaves_its_turn_when_the_load_ends() -> None:
    exchange, cancel = Recorded(), threading.Event()
    exchange.expect(["first", "second"])

    def wait_in_vain(*_: object) -> None:
        threading.Timer(0.05, cancel.set).start()
        exchange("second", maxima(1.0))

    with pytest.raises(LoadCancelledError):
        Crew(1, cancel).work(wait_in_vain)
    assert not exchange.sent
