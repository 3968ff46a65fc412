"""A rank that fails or is killed ends the load of the others, with the reason."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from quantload.errors import LoadCancelledError, RankError
from quantload.ranks.watch import Watch
from torch._C._distributed_c10d import HashStore


def together(first: object, second: object) -> list[BaseException | None]:
    """What two ranks that do these things raise."""
    store = HashStore()

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
