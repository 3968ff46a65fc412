"""One range of a remote file: what is asked for again, and what is an error at once."""

from __future__ import annotations

import math
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from memory_client import MemoryClient
from quantload.checkpoint.crew import Stopped
from quantload.checkpoint.remote import requests as requests_module
from quantload.checkpoint.remote.client import (
    CONNECT_SECONDS,
    STALL_SECONDS,
    Answer,
    MissingError,
    PassingError,
    PassingKind,
    RefusedError,
    Tag,
)
from quantload.checkpoint.remote.requests import Requests, nothing_stops
from quantload.errors import ChangedFileError, CheckpointError, MissingShardError, TruncatedShardError

CONTENT = random.Random(1).randbytes(100_000)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "FIRST_PAUSE", 0.0)


def fill(requests: Requests, start: int = 0, length: int = len(CONTENT)) -> bytes:
    into = bytearray(length)
    requests.fill("a", start, memoryview(into), nothing_stops)
    return bytes(into)


def test_a_range_comes_as_it_is() -> None:
    assert fill(Requests(MemoryClient({"a": CONTENT})), 7, 5000) == CONTENT[7:5007]


def test_what_broke_off_goes_on_where_it_was() -> None:
    client = MemoryClient({"a": CONTENT})
    chance = random.Random(3)
    requests = Requests(client, retries=0)
    client.trouble = lambda name, start, stop: (
        (chance.randrange(1, stop - start), PassingError("connection", "reset")) if stop - start > 1000 else None
    )
    assert fill(requests) == CONTENT
    assert requests.counters.requests["connection"] == requests.counters.retries > 1
    assert requests.counters.nbytes < len(CONTENT) + 1000, "nothing came twice"


@pytest.mark.parametrize("kind", get_args(PassingKind))
def test_what_may_pass_is_tried_so_many_times_in_a_row(kind: PassingKind) -> None:
    client = MemoryClient({"a": CONTENT})
    requests = Requests(client, retries=3)
    requests.size("a", nothing_stops)
    client.trouble = lambda name, start, stop: (0, PassingError(kind, "said so"))
    with pytest.raises(CheckpointError, match=r"a: cannot be read from test://files at byte 0 after 4 tries.*said so"):
        fill(requests)
    assert requests.counters.requests[kind] == 4
    assert requests.counters.retries == 3


def test_errors_that_will_not_pass_are_not_tried_again() -> None:
    client = MemoryClient({"a": CONTENT})
    client.trouble = lambda name, start, stop: (0, RefusedError("HTTP 403", credentials=True))
    with pytest.raises(CheckpointError, match="HTTP 403; log in"):
        fill(Requests(client))
    assert len(client.asked) == 1


def test_a_file_that_is_missing_says_so() -> None:
    with pytest.raises(MissingShardError, match="a: no such file at test://files"):
        fill(Requests(MemoryClient({})))


def test_what_the_server_answered_for_a_missing_file_is_said() -> None:
    class Answers(MemoryClient):
        def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
            raise MissingError("HTTP 404, NoSuchKey")

    with pytest.raises(MissingShardError, match=r"a: no such file at test://files \(HTTP 404, NoSuchKey\); check"):
        fill(Requests(Answers({})))


def test_a_file_that_is_too_short_says_so() -> None:
    with pytest.raises(TruncatedShardError, match="100,000 bytes at test://files, while bytes up to 100,010"):
        fill(Requests(MemoryClient({"a": CONTENT})), 10)


@pytest.mark.parametrize(
    ("then", "said"),
    [(CONTENT[::-1], "another version"), (b"short", "another version"), (None, "no longer there")],
)
def test_a_file_that_changes_is_an_error(then: bytes | None, said: str) -> None:
    client = MemoryClient({"a": CONTENT})
    requests = Requests(client)
    fill(requests, 0, 10)
    client.files = {} if then is None else {"a": then}
    with pytest.raises(ChangedFileError, match=said):
        fill(requests, 10, 10)
    with pytest.raises(ChangedFileError, match=said):
        requests.note("a", nothing_stops)


STRONG, WEAK = Tag(5, '"a"', "monday", "1"), Tag(5, 'W/"a"', "monday")


@pytest.mark.parametrize(
    ("one", "other", "another"),
    [
        (STRONG, Tag(5, '"a"'), False),
        (STRONG, Tag(5, '"a"', "tuesday", "2"), False),
        (STRONG, Tag(5, '"b"', "monday", "1"), True),
        (STRONG, Tag(6, '"a"', "monday", "1"), True),
        (STRONG, Tag(5), False),
        (STRONG, Tag(6), True),
        (STRONG, Tag(5, None, "monday"), False),
        (STRONG, Tag(5, None, "tuesday"), True),
        (STRONG, Tag(5, None, None, "2"), True),
        (STRONG, WEAK, False),
        (STRONG, WEAK._replace(modified="tuesday"), True),
        (WEAK, WEAK._replace(etag='W/"b"'), True),
        (WEAK, WEAK._replace(modified="tuesday"), True),
        (WEAK, Tag(5, None, None, "2"), False),
    ],
)
def test_what_both_answers_say_tells_versions_apart(one: Tag, other: Tag, another: bool) -> None:
    assert one.is_another(other) == other.is_another(one) == another
    assert not one.is_another(one)


def test_what_an_answer_lacks_is_no_change_and_what_it_adds_is_remembered() -> None:
    answers = iter([Tag(0, None, "monday"), Tag(0, '"a"'), Tag(0), Tag(0, '"a"', "tuesday"), Tag(0, '"b"', "monday")])

    class Forgetful(MemoryClient):
        def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
            return Answer(next(answers), ())

    requests = Requests(Forgetful({}))
    for _ in range(4):
        requests.note("a", nothing_stops)
    assert requests.known["a"] == Tag(0, '"a"', "monday")
    with pytest.raises(ChangedFileError, match="another version"):
        requests.note("a", nothing_stops)


def test_what_is_asked_again_is_said_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    times = iter([0.0, 0.5, 0.9, 1.0, 1.5])
    logger = SimpleNamespace(warning=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(requests_module, "logger", logger)
    monkeypatch.setattr(requests_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(requests_module, "_pause", lambda failures, stopping: None)
    client = MemoryClient({"a": CONTENT})
    client.trouble = lambda name, start, stop: (0, PassingError("throttled", "HTTP 503"))
    with pytest.raises(CheckpointError, match="after 6 tries in a row"):
        Requests(client, retries=5).size("a", nothing_stops)
    assert said == [
        "test://files/a: HTTP 503; asked again (1 of at most 5 times in a row)",
        "test://files/a: HTTP 503; asked again (4 of at most 5 times in a row)",
    ]


def test_the_page_says_how_long_a_dead_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    each = [
        min(requests_module.FIRST_PAUSE * 2.0**number, requests_module.LONGEST_PAUSE)
        for number in range(requests_module.RETRIES)
    ]
    page = " ".join((Path(__file__).parents[2] / "docs" / "sources.md").read_text().split())
    assert f"The pauses are {sum(each) / 2:.0f} to {sum(each):.0f} seconds together" in page
    tries = requests_module.RETRIES + 1
    assert f"each of {tries} tries takes {CONNECT_SECONDS:.0f} seconds" in page
    for seconds, text in ((CONNECT_SECONDS, "after up to {} minutes"), (STALL_SECONDS, "seconds each, after up to {}")):
        assert text.format(math.ceil((tries * seconds + sum(each)) / 60)) in page


def test_a_missing_file_that_appears_is_an_error() -> None:
    client = MemoryClient({})
    requests = Requests(client)
    requests.note("a", nothing_stops)
    client.files["a"] = CONTENT
    with pytest.raises(ChangedFileError, match="it was not there before"):
        requests.note("a", nothing_stops)


def test_a_pause_ends_when_all_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "FIRST_PAUSE", 60.0)
    client = MemoryClient({"a": CONTENT})
    client.trouble = lambda name, start, stop: (0, PassingError("throttled", "HTTP 503"))
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    before = time.monotonic()
    with pytest.raises(Stopped):
        Requests(client).fill("a", 0, memoryview(bytearray(5)), stop.is_set)
    assert time.monotonic() - before < 10
