"""What `/openapi.json` says of the routes that exchange the weights, where a server has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .openapi_fields import Schema, ref
from .weights import FINISH, FINISH_FIELDS, MOST_BYTES, RELOAD, RELOAD_FIELDS, START, START_FIELDS, UPDATE

_KINDS = {str: "string", bool: "boolean"}
_TEXTS = {
    "checkpoint": "A folder below the one that the server was given",
    "adapter": "The folder of a LoRA adapter there, which is added to the weights",
    "partial": "Whether what does not come stays as it is; without, all must come",
    "weight_version": "Taken and not looked at",
}


def _request(fields: Mapping[str, type], required: Collection[str] = ()) -> Schema:
    properties = {name: {"type": _KINDS[kind], "description": _TEXTS[name]} for name, kind in fields.items()}
    return {
        "type": "object", "additionalProperties": False, "required": sorted(required), "properties": properties,
    }  # fmt: skip


_SHARED_MEMORY: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["shared_memory"],
    "properties": {
        "shared_memory": {
            "type": "string",
            "description": "Name of a block of POSIX shared memory of the same machine, with a safetensors file in it",
        }
    },
}
_SAID: Schema = {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}
_EXCHANGED: Schema = {
    "type": "object",
    "required": ["bytes_read", "message", "seconds", "state"],
    "properties": {
        "message": {"type": "string"},
        "state": {"enum": ["complete", "incomplete"], "description": "incomplete: an earlier failure is not repaired"},
        "bytes_read": {"type": "integer"},
        "seconds": {"type": "number"},
    },
}
_SCHEMAS: dict[str, Schema] = {
    "ReloadRequest": _request(RELOAD_FIELDS, {"checkpoint"}),
    "UpdateStart": _request(START_FIELDS),
    "UpdateTensors": {
        "anyOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["update_info"],
                "properties": {"update_info": {"$ref": "#/components/schemas/SharedTensors"}},
            },
            {"$ref": "#/components/schemas/SharedTensors"},
        ]
    },
    "SharedTensors": _SHARED_MEMORY,
    "UpdateFinish": _request(FINISH_FIELDS),
    "UpdateStep": _SAID,
    "WeightsExchanged": _EXCHANGED,
}
_OF_UPDATES = frozenset(_SCHEMAS) - {"ReloadRequest", "WeightsExchanged"}
ERRORS = {
    "400": "The request is wrong, or the weights were not exchanged: the message says why, `/health` what follows",
    "401": "The API key is wrong or missing",
    "403": "The request is for a host that this server is not",
    "408": "The body did not come in time",
    "409": "The weights are being exchanged already, or no update was started",
    "413": f"The body is too large: tensors come in at most {MOST_BYTES >> 20} MiB a request",
    "500": "The model could not be loaded",
    "503": "The model is still loading, or the server is stopping",
}


def _route(summary: str, takes: Schema, answers: str, is_required: bool) -> Schema:
    errors = {
        status: {"description": text, "content": {"application/json": {"schema": ref("Error")}}}
        for status, text in ERRORS.items()
    }
    answer = {"description": "OK", "content": {"application/json": {"schema": ref(answers)}}}
    return {
        "post": {
            "summary": summary,
            "operationId": summary.lower().replace(" ", "_"),
            "security": [{"key": []}],
            "requestBody": {"required": is_required, "content": takes},
            "responses": {"200": answer} | errors,
        }
    }


def _json(name: str) -> Schema:
    return {"application/json": {"schema": ref(name)}}


_FILE: Schema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_PATHS = {
    RELOAD: _route("Reload the weights", _json("ReloadRequest"), "WeightsExchanged", True),
    START: _route("Start a weight update", _json("UpdateStart"), "UpdateStep", False),
    UPDATE: _route("Update weights", _json("UpdateTensors") | _FILE, "UpdateStep", True),
    FINISH: _route("Finish a weight update", _json("UpdateFinish"), "WeightsExchanged", False),
}


def weight_paths(present: Collection[str]) -> tuple[dict[str, Schema], dict[str, Schema]]:
    """The paths of those routes that there are, and the schemas that they refer to."""
    paths = {path: route for path, route in _PATHS.items() if path in present}
    left_out = ({"ReloadRequest"} if RELOAD not in paths else set()) | (_OF_UPDATES if UPDATE not in paths else set())
    return paths, {name: schema for name, schema in _SCHEMAS.items() if paths and name not in left_out}
