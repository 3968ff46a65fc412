"""`/openapi.json`: every route, what it takes, gives and refuses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .openapi_fields import PARTS, REQUESTS, TOKENS, Schema, ref
from .openapi_weights import weight_paths

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}


def _told(**properties: Schema) -> Schema:
    """An object that has these fields, and perhaps more in a later version."""
    return {"type": "object", "required": sorted(properties), "properties": properties}


def _answer(name: str, choice: Schema) -> Schema:
    return _told(
        id=_TEXT, object={"const": name}, created=_WHOLE, model=_TEXT, choices={"type": "array", "items": choice},
        usage=ref("Usage"),
    )  # fmt: skip


_REASON: Schema = {"enum": ["stop", "length", "tool_calls"]}
_LOGPROBS: Schema = {"type": ["object", "null"]}

ANSWERS: dict[str, Schema] = {
    "Error": _told(error=_told(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT)),
    "Usage": _told(prompt_tokens=_WHOLE, completion_tokens=_WHOLE, total_tokens=_WHOLE),
    "Completion": _answer(
        "text_completion", _told(index=_WHOLE, text=_TEXT, finish_reason=_REASON, logprobs=_LOGPROBS)
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        _told(index=_WHOLE, message=_told(role=_TEXT), finish_reason=_REASON, logprobs=_LOGPROBS),
    ),
    "Embeddings": _told(
        object={"const": "list"},
        model=_TEXT,
        usage=_told(prompt_tokens=_WHOLE, total_tokens=_WHOLE),
        data={"type": "array", "items": _told(index=_WHOLE, embedding={"type": ["array", "string"]})},
    ),
    "Model": _told(
        id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT, max_model_len={"type": ["integer", "null"]}
    ),
    "Models": _told(object={"const": "list"}, data={"type": "array", "items": ref("Model")}),
    "Tokens": _told(count=_WHOLE, max_model_len={"type": ["integer", "null"]}, tokens=TOKENS),
    "Text": _told(prompt=_TEXT),
    "Version": _told(version=_TEXT),
    "Health": _told(status={"enum": ["ok", "loading", "reloading", "failed", "unhealthy"]}, model=_TEXT),
    "LoadReport": {"type": "object"},
    "LoadPage": _told(title=_TEXT, html=_TEXT, data={"type": "object"}),
    "Description": {"type": "object"},
}

_ERRORS = {
    "400": "The request is wrong: `param` names the field; or it does not fit into the context",
    "401": "The API key is wrong or missing",
    "403": "The request is for a host that this server is not",
    "404": "There is no such model or route",
    "405": "The route has another method",
    "408": "The body did not come in time",
    "413": "The body is larger than any prompt of this model needs",
    "429": "The queue is full",
    "500": "The model could not be loaded, or the generation failed",
    "503": "The model is still loading, or the server is stopping",
}
_RETRY = frozenset({"429", "503"})


def _error(status: str) -> Schema:
    headers = {"Retry-After": {"description": "Seconds", "schema": _WHOLE}} if status in _RETRY else {}
    return {
        "description": _ERRORS[status],
        "headers": headers,
        "content": {"application/json": {"schema": ref("Error")}},
    }


def _route(
    summary: str, answers: str | None, takes: str | None = None, kind: str = "application/json", errors: str = ""
) -> Schema:
    """One operation; `errors` are the statuses that only some routes have."""
    schema = {} if answers is None else ref(answers)
    content: Schema = {kind: {"schema": schema}}
    if answers in ("Completion", "ChatCompletion"):
        content["text/event-stream"] = {"schema": {}}
    statuses = sorted({"401", "403", "500", "503", *errors.split(), *(["400", "404", "408", "413"] if takes else [])})
    route: Schema = {
        "summary": summary,
        "operationId": summary.lower().replace(" ", "_"),
        "responses": {"200": {"description": "OK", "content": content}} | {one: _error(one) for one in statuses},
    }
    if takes:
        route["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref(takes)}}}
    return route


def description(version: str, weight_routes: Collection[str] = ()) -> dict[str, Any]:
    """The OpenAPI 3.1 description of this server, for a version of quantload.

    `weight_routes` are the paths that exchange the weights, which only some servers have.
    """
    exchanging, schemas = weight_paths(weight_routes)
    health = _route("Health", "Health")
    health["security"] = []
    health["responses"] = {
        status: {"description": text, "content": {"application/json": {"schema": ref("Health")}}}
        for status, text in (("200", "The model answers"), ("500", "It was not loaded"), ("503", "It is loading"))
    } | {"403": _error("403")}
    started = {**health, "summary": "Startup probe", "operationId": "startup_probe"}
    probes = {
        f"/{name}z": {"get": {**health, "summary": f"{name.title()} probe", "operationId": f"{name}_probe"}}
        for name in ("live", "ready")
    }
    one = _route("Model", "Model", errors="404")
    one["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    paths = {
        "/v1/completions": {"post": _route("Completions", "Completion", "CompletionRequest", errors="429")},
        "/v1/chat/completions": {"post": _route("Chat completions", "ChatCompletion", "ChatRequest", errors="429")},
        "/v1/embeddings": {"post": _route("Embeddings", "Embeddings", "EmbeddingRequest", errors="429")},
        "/v1/models": {"get": _route("Models", "Models")},
        "/v1/models/{model}": {"get": one},
        "/tokenize": {"post": _route("Tokenize", "Tokens", "TokenizeRequest")},
        "/detokenize": {"post": _route("Detokenize", "Text", "DetokenizeRequest")},
        "/load_model": {"post": _route("Load model", None, "LoadModelRequest", "text/event-stream")},
        "/version": {"get": _route("Version", "Version")},
        "/load_report": {"get": _route("Load report", "LoadReport")},
        "/metrics": {"get": _route("Metrics", None, kind="text/plain")},
        "/health": {"get": health},
        **probes,
        "/startupz": {"get": started},
        "/": {"get": _route("Load page", None, kind="text/html")},
        "/load_page": {"get": _route("Parts of the load page", "LoadPage", errors="404")},
        "/load_events": {"get": _route("Events of the load", None, kind="text/event-stream", errors="429")},
        "/openapi.json": {"get": _route("Description", "Description")},
        **exchanging,
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "quantload",
            "version": version,
            "description": "One quantized model, as OpenAI's API has it",
        },
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": REQUESTS | PARTS | ANSWERS | schemas,
        },
    }
