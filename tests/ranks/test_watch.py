"""A rank that fails or is killed ends the load of the others, with the reason."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from quantload.errors import LoadCancelledError, RankError
from quantload.ranks import watch as watch_module
from quantload.ranks.watch import Watch
from torch._C._distributed_c10d import HashStore


def together(first: object, second: object, store: HashStore | None = None) -> list[BaseException | None]:
    """What two ranks that do these things raise."""
    store = store or HashStore()

    def rank(number: int, body: object) -> BaseException | None:
        try:
            watch = Watch(store, number, 2)
            with watch.explaining(), watch:
                assert callable(body)
                body(watch)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2), [first, second]))


def test_each_hears_what_the_others_say() -> None:
    heard: dict[int, list[int]] = {}

    def say(number: int) -> object:
        return lambda watch: heard.update({number: watch.gather("numbers", number)})

    assert together(say(3), say(4)) == [None, None]
    assert heard == {3: [3, 4], 4: [3, 4]}


def test_a_failure_elsewhere_ends_what_waits_and_says_why() -> None:
    def fail(_: Watch) -> None:
        raise OSError("the disk is gone")

    found = together(lambda watch: watch.gather("loaded", 1), fail)
    assert isinstance(found[0], RankError)
    assert str(found[0]) == "rank 1 failed: the disk is gone"
    assert isinstance(found[1], OSError)


def test_a_load_that_was_cancelled_for_it_says_why() -> None:
    def read(watch: Watch) -> None:
        assert watch.cancel.wait(30)
        raise LoadCancelledError("the load was cancelled")

    def fail(_: Watch) -> None:
        raise ValueError("no such scale")

    (cancelled, _) = together(read, fail)
    assert isinstance(cancelled, RankError)
    assert str(cancelled) == "rank 1 failed: no such scale"


def test_an_error_of_its_own_is_no_other_rank_s() -> None:
    def fail(_: Watch) -> None:
        raise ValueError("mine")

    assert [str(error) for error in together(fail, fail)] == ["mine", "mine"]


def test_an_error_of_its_own_stays_what_it_is_whatever_happened_elsewhere() -> None:
    def fail(watch: Watch) -> None:
        assert watch.cancel.wait(60)
        raise ValueError("mine")

    def fail_first(_: Watch) -> None:
        raise OSError("the disk is gone")

    assert [str(error) for error in together(fail, fail_first)] == ["mine", "the disk is gone"]


class SlowToFail:
    """A store in which what is said of a failure can be read long before whoever said it goes on."""

    def __init__(self) -> None:
        self._real = HashStore()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def set(self, key: str, value: str) -> None:
        self._real.set(key, value)
        if key == "failed":
            time.sleep(0.1)


def test_a_rank_does_not_take_its_own_failure_for_another_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "POLL_SECONDS", 0.001)
    watch = Watch(cast(Any, SlowToFail()), 0, 1)
    with pytest.raises(LoadCancelledError, match="mine"), watch.explaining(), watch:
        raise LoadCancelledError("mine")
    assert watch.trouble is None


def test_what_is_exchanged_and_said_is_not_kept() -> None:
    heard, store = {}, HashStore()

    def say(watch: Watch) -> None:
        rank = watch._rank
        heard[rank] = [watch.exchange("maxima", bytes([rank, 0, 255])), watch.gather("read", rank)]

    assert together(say, say, store) == [None, None]
    assert heard == {0: [[bytes([1, 0, 255])], [0, 1]], 1: [[bytes([0, 0, 255])], [0, 1]]}
    assert store.num_keys() == 0


def test_a_rank_that_was_killed_is_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        watch = Watch(HashStore(), 0, 1)
        with watch:
            watch._others = {1: child.pid}
            assert watch._find() is None
            child.kill()
            assert watch.cancel.wait(30)
        with pytest.raises(RankError, match=f"rank 1 .process {child.pid}. was killed, or ended"):
            watch.raise_trouble()
    finally:
        child.kill()
        child.wait()


def test_no_thread_is_left() -> None:
    together(lambda _: None, lambda _: None)
    assert not [thread for thread in threading.enumerate() if thread.name == "quantload-ranks"]
