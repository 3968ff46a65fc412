"""`/openapi.json` says what the parser does: the same fields, the same bounds, the routes that there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantload
from quantload.server import ServerState, create_app
from quantload.server.api_errors import ApiError
from quantload.server.embeddings import EMBEDDING_FIELDS
from quantload.server.generation_request import CHAT_FIELDS, COMPLETION_FIELDS, parse_chat, parse_completion
from quantload.server.openapi import description
from quantload.server.token_routes import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from quantload.server.weights import WeightRoutes
from server_harness import Client, running_app
from starlette.routing import Route

HELLO = [{"role": "user", "content": "hello"}]
SPEC = description("1")
SCHEMAS = SPEC["components"]["schemas"]
PARSERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CompletionRequest": (parse_completion, {"prompt": "x"}),
    "ChatRequest": (parse_chat, {"messages": HELLO}),
}
BESIDE = {"top_logprobs": {"logprobs": True}, "stream_options": {"stream": True}}
"""What a field needs beside it."""
EMPTY: list[Any] = [True, False, 3.5, 0, "", [], {}]
"""What a parser that asks for truth alone takes for nothing."""
EXAMPLES: dict[str, list[Any]] = {
    "prompt": ["", "x", ["x", "y"], [1, 2], [[1], [2]]],
    "messages": [HELLO],
    "stop": ["x", ["x"], []],
    "logit_bias": [{}, {"7": -100}, {"7": 100.0}],
    "temperature": [0, 0.0, 1e-5, 2],
    "stop_token_ids": [[], [0, 7]],
    "stream_options": [{}, {"include_usage": True}, {"include_obfuscation": False, "continuous_usage_stats": False}],
    "tools": [[], [{"type": "function", "function": {"name": "f"}}]],
    "chat_template_kwargs": [{}, {"enable_thinking": False}],
    "generation_config": ["{}", '{"do_sample": true}'],
    "model": ["tiny"],
    "response_format": [{"type": "text"}],
    "tool_choice": ["none", "auto"],
}


def bounds(schema: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Values at a schema's bounds, and those beyond."""
    step = 1 if "integer" in schema["type"] else 1e-6
    inside = [schema[name] for name in ("minimum", "maximum") if name in schema]
    beyond = [schema[name] + sign * step for name, sign in (("minimum", -1), ("maximum", 1)) if name in schema]
    return inside, [*beyond, *([schema["exclusiveMinimum"]] if "exclusiveMinimum" in schema else [])]


@pytest.mark.parametrize("kind", PARSERS)
def test_every_field_is_read_as_it_is_described(kind: str) -> None:
    parse, base = PARSERS[kind]
    for name, schema in SCHEMAS[kind]["properties"].items():
        beside = BESIDE.get(name, {})
        kinds = schema.get("type", [])
        if "enum" in schema:
            right, wrong = schema["enum"], ["wrong", 7]
        elif "integer" in kinds or "number" in kinds:
            right, wrong = bounds(schema)
            wrong = [*wrong, True, "1"]
        elif "boolean" in kinds:
            right, wrong = [True, False], [0, 1, "true"]
        elif schema.keys() == {"description"}:  # taken and not used
            right, wrong = [3, "x", {}], []
        else:
            right = EXAMPLES[name]
            wrong = [one for one in EMPTY if not any(type(one) is type(like) and one == like for like in right)]
        optional = name not in SCHEMAS[kind]["required"]
        for value in [*right, *([None] if optional else [])]:
            parse({**base, **beside, name: value}, "tiny")
        for value in wrong:
            with pytest.raises(ApiError) as caught:
                parse({**base, **beside, name: value}, "tiny")
            assert caught.value.status in (400, 404), (name, value)
            assert caught.value.param == name, (name, value)


def test_the_fields_are_those_of_the_parser() -> None:
    for kind, names in {
        "CompletionRequest": COMPLETION_FIELDS,
        "ChatRequest": CHAT_FIELDS,
        "EmbeddingRequest": EMBEDDING_FIELDS,
        "TokenizeRequest": TOKENIZE_FIELDS,
        "DetokenizeRequest": DETOKENIZE_FIELDS,
    }.items():
        assert set(SCHEMAS[kind]["properties"]) == names
        assert SCHEMAS[kind]["additionalProperties"] is False


def routes_of(app: Any) -> set[tuple[str, str]]:
    return {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }


def described(spec: dict[str, Any]) -> set[tuple[str, str]]:
    return {(path, method) for path, methods in spec["paths"].items() for method in methods}


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [found for one in value.values() for found in references(one)]
    return [found for one in value for found in references(one)] if isinstance(value, list) else []


def check_references(spec: dict[str, Any]) -> None:
    """Every reference leads somewhere, and every schema is referred to."""
    assert {name.removeprefix("#/components/schemas/") for name in references(spec)} == set(
        spec["components"]["schemas"]
    )


@pytest.mark.parametrize(("reloads", "updates"), [(True, False), (False, True), (True, True)])
def test_routes_that_exchange_the_weights_are_described_where_there_are_some(
    reloads: bool, updates: bool, tmp_path: Path
) -> None:
    weights = WeightRoutes(tmp_path if reloads else None, updates)
    with running_app(create_app(ServerState("tiny"), "key", weights=weights)) as client:
        spec = client.get("/openapi.json", authorization="Bearer key").json
    routes = routes_of(create_app(ServerState("tiny"), "key", weights=weights))
    assert described(spec) == routes
    added = {path for path, _ in routes} - set(SPEC["paths"])
    assert len(added) == reloads + 3 * updates
    for path in added:
        assert spec["paths"][path]["post"]["security"] == [{"key": []}]
    operations = [each["operationId"] for methods in spec["paths"].values() for each in methods.values()]
    assert len({*operations}) == len(operations)
    check_references(spec)


def test_the_routes_are_those_of_the_application(client: Client) -> None:
    assert described(SPEC) == routes_of(create_app(ServerState("tiny")))
    assert client.get("/openapi.json").json == json.loads(json.dumps(description(quantload.__version__)))


def test_every_reference_leads_somewhere() -> None:
    assert references(SPEC)
    check_references(SPEC)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/completions", {"prompt": "the", "max_tokens": 2, "logprobs": 1}, "Completion"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}, "ChatCompletion"),
        ("/v1/models", None, "Models"),
        ("/v1/models/tiny", None, "Model"),
        ("/tokenize", {"prompt": "the"}, "Tokens"),
        ("/detokenize", {"tokens": [1]}, "Text"),
        ("/version", None, "Version"),
        ("/health", None, "Health"),
        ("/nowhere", None, "Error"),
    ],
)
def test_answers_have_what_is_described(client: Client, path: str, body: Any, kind: str) -> None:
    told = (client.get(path) if body is None else client.post(path, body)).json

    def check(value: Any, schema: dict[str, Any], where: str) -> None:
        if "$ref" in schema:
            schema = SCHEMAS[schema["$ref"].rpartition("/")[2]]
        if "const" in schema:
            assert value == schema["const"], where
        for name in schema.get("required", ()):
            check(value[name], schema["properties"][name], f"{where}.{name}")
        for index, item in enumerate(value if "items" in schema else ()):
            check(item, schema["items"], f"{where}[{index}]")
        types = {"string": str, "integer": int, "object": dict, "array": list, "null": type(None)}
        if "type" in schema:
            kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            assert isinstance(value, tuple(types[one] for one in kinds)), where

    check(told, {"$ref": f"#/components/schemas/{kind}"}, kind)
