"""The tables of `docs/server.md` say what the parser and the application do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from quantload.server import ServerState, create_app
from quantload.server.generation_request import CHAT_FIELDS, COMPLETION_FIELDS, INERT, ONLY_DEFAULT
from starlette.routing import Route

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text()
ROW = re.compile(r"^\| (`[^|]*`) \| (\w+) \| (yes|no|taken, not used) \| (.*) \|$", re.MULTILINE)
ROWS = [(match[1].strip("`"), match[2], match[3], match[4]) for match in ROW.finditer(PAGE)]
FIELDS = [row for row in ROWS if re.fullmatch(r"\w+", row[0])]
ROUTES = [row for row in ROWS if "/" in row[0]]
READ = (CHAT_FIELDS | COMPLETION_FIELDS) - INERT - set(ONLY_DEFAULT)


@pytest.mark.parametrize(("name", "here"), [(name, here) for name, _, here, _ in FIELDS])
def test_what_is_said_of_a_field_is_so(name: str, here: str) -> None:
    assert {"yes": name in READ, "no": name not in READ | INERT, "taken, not used": name in INERT}[here]


def test_no_field_is_missing() -> None:
    names = [name for name, _, _, _ in FIELDS]
    assert len(names) == len(set(names))
    own = {"stream", *chat.CompletionCreateParamsBase.__annotations__}
    own |= {*completion.CompletionCreateParamsBase.__annotations__}
    assert own <= set(names)
    assert set(names) >= CHAT_FIELDS | COMPLETION_FIELDS


def test_what_is_said_of_routes_is_so() -> None:
    there = {
        f"{method} {route.path.replace('{model:path}', '{id}')}"
        for route in create_app(ServerState("tiny")).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert {name for name, _, here, _ in ROUTES if here == "yes"} == there
    refused = {name for names, _, here, _ in ROUTES if here == "no" for name in names.split("`, `")}
    assert not {name.rpartition(" ")[2] for name in refused} & {name.rpartition(" ")[2] for name in there}
