"""`bench/serve_load.py`: that it sees what is wrong, in every run of the tests; a short run of it in the slow group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import serve_load
from serve_clients import Reply, Row, _streamed, judge, questions
from serve_process import KEY, Held
from serve_wrong import keys, misshapen, wrong_requests

ERROR = {"error": {"message": "m", "type": "t", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("status", "text", "headers", "outcome", "wrong"),
    [
        (200, "a", {}, "right", 0),
        (200, "b", {}, "another answer", 1),
        (500, "a", {}, "500", 1),
        (400, "a", {}, "400", 1),
        (429, "x", {"retry-after": "1"}, "queue is full", 0),
        (429, "x", {}, "queue is full", 1),
    ],
)
def test_answers_are_judged(status: int, text: str, headers: dict[str, str], outcome: str, wrong: int) -> None:
    row = Row("load", "x")
    judge(row, Reply(status, text, 0.1, 0.2, httpx.Headers(headers)), "a")
    assert row.outcomes == {outcome: 1}
    assert len(row.wrong) == wrong


def test_a_stream_that_breaks_off_is_not_an_answer() -> None:
    event = 'data: {"choices": [{"text": "ab"}]}'
    assert _streamed([event, "", event, "", "data: [DONE]", ""]) == "abab"
    assert _streamed([event, ""]) == "the stream has no [DONE]"
    assert _streamed([event, 'data: {"error": {"message": "m"}}', "data: [DONE]"]) == "error: m"


@pytest.mark.parametrize(
    ("status", "body", "headers", "right"),
    [
        (400, ERROR, {"x-request-id": "1"}, True),
        (413, ERROR, {"x-request-id": "1"}, True),
        (400, ERROR, {}, False),
        (200, ERROR, {"x-request-id": "1"}, False),
        (500, ERROR, {"x-request-id": "1"}, False),
        (400, {"detail": "m"}, {"x-request-id": "1"}, False),
        (422, [], {"x-request-id": "1"}, False),
    ],
)
def test_refusals_must_have_openais_shape(status: int, body: Any, headers: dict[str, str], right: bool) -> None:
    assert (misshapen(httpx.Response(status, json=body, headers=headers)) is None) == right


@pytest.mark.parametrize("name", list(serve_load.GROWTH))
def test_what_grows_is_seen(name: str) -> None:
    def samples(growth: int) -> list[Held]:
        more = {"rss_bytes": 600 << 20, "descriptors": 20, "threads": 8}
        return [Held(**{**more, name: more[name] + growth * each // 79}) for each in range(80)]

    made = serve_load.Samples(server=None)  # type: ignore[arg-type]
    made.held = samples(0)
    assert made.row().wrong == []
    made.held = samples(200 << 20)
    assert [name in text for text in made.row().wrong] == [True]


def test_no_key_that_is_tried_is_the_key() -> None:
    assert f"Bearer {KEY}" not in keys()
    assert len(keys()) == len(set(keys())) >= 15
    assert len({request.kind for request in wrong_requests()}) >= 12
    assert len({question.kind for question in questions()}) == 4


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    command = [sys.executable, serve_load.__file__, "--seconds", "3", "--clients", "8", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("serve_load-20*-part.json")
    result = json.loads(path.read_text())
    assert {row["group"] for row in result["rows"]} == {
        "load", "a full queue", "clients that leave", "clients that do not read", "unfinished requests",
        "wrong requests", "end",
    }  # fmt: skip
    assert sum(row["wrong"] for row in result["rows"]) == 0
    assert "| SIGTERM with requests under way |" in serve_load.render(result)
