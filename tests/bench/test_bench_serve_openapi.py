"""`bench/serve_openapi.py` sees what is wrong in a report of Schemathesis; five minutes of it are run by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import serve_openapi


def scenario(status: int | None, *failed: str) -> dict[str, Any]:
    response = None if status is None else {"status_code": status}
    checks = [{"name": name, "status": "failure"} for name in failed]
    return {
        "ScenarioFinished": {
            "recorder": {
                "label": "POST /x",
                "cases": {"a": {"value": {"body": {"prompt": "x", "max_tokens": 1}}}},
                "checks": {"a": [{"name": "not_a_server_error", "status": "success"}, *checks]},
                "interactions": {"a": {"response": response}},
            }
        }
    }


@pytest.mark.parametrize(
    ("status", "failed", "wrong"),
    [
        (200, [], 0),
        (400, [], 0),
        (400, ["positive_data_acceptance"], 0),
        (200, ["max_response_time"], 0),
        (200, ["negative_data_rejection"], 1),
        (500, [], 1),
        (503, ["not_a_server_error"], 2),
        (None, [], 1),  # of one token
    ],
)
def test_what_a_report_has_is_judged(tmp_path: Path, status: int | None, failed: list[str], wrong: int) -> None:
    report = tmp_path / "report.ndjson"
    lines = [{"Initialize": {"schemathesis_version": "4"}}, scenario(status, *failed)]
    report.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = serve_openapi.counted(report) | {"seconds_per_token": 0.01}
    assert (result["schemathesis"], result["requests"]) == ("4", 1)
    assert result["checks"]["not_a_server_error"] >= 1
    assert len(serve_openapi.wrong(result)) == wrong


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x"}, 1024),
        ({"prompt": [1, 2], "max_tokens": 5}, 5),
        ({"prompt": ["x", "y"], "n": 3, "max_tokens": 5}, 30),
        ({"messages": [], "n": None, "max_completion_tokens": 7, "max_tokens": 9}, 7),
        ({"messages": [], "max_tokens": 1 << 30, "n": 4}, 4096),
    ],
)
def test_how_much_a_request_asks_for(body: dict[str, Any], tokens: int) -> None:
    assert serve_openapi.tokens_asked(body) == tokens


def test_no_request_at_all_is_wrong(tmp_path: Path) -> None:
    report = tmp_path / "report.ndjson"
    report.write_text("")
    assert serve_openapi.wrong(serve_openapi.counted(report) | {"seconds_per_token": 1.0}) == ["no request was made"]
