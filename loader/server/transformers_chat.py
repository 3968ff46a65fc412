"""What transformers' own `chat` command says in its own words: the generation config as a text, and `/load_model`."""

from __future__ import annotations

import json
from typing import Any

from .api_errors import bad_request
from .json_values import parse_json

_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SILENT = frozenset({"transformers_version", "_from_model_config", "bos_token_id", "pad_token_id"})


def request_fields(config: object) -> dict[str, Any]:
    """The fields of a request that say what `generation_config` says, a JSON text of transformers' `GenerationConfig`.

    Raises `ApiError` (400) for what is no such text, and for what cannot be said in fields of a request.
    """
    if not isinstance(config, str):
        raise bad_request("`generation_config` must be a string of JSON", "generation_config")
    parsed = parse_json(config, "generation_config")
    if not isinstance(parsed, dict):
        raise bad_request("`generation_config` must hold a JSON object", "generation_config")
    given = {name: value for name, value in parsed.items() if value is not None and name not in _SILENT}
    fields = {name: given.pop(name) for name in _SAME if name in given}
    if "max_new_tokens" in given:
        fields["max_tokens"] = given.pop("max_new_tokens")
    if "eos_token_id" in given:
        ends = given.pop("eos_token_id")
        fields["stop_token_ids"] = ends if isinstance(ends, list) else [ends]
    sampled = given.pop("do_sample", None)
    if sampled is False:
        fields["temperature"] = 0
    elif sampled is True and "temperature" not in fields:
        fields["do_sample"] = True
    if given:
        raise bad_request(
            f"`generation_config` says {', '.join(sorted(given))}, which this server cannot do per request",
            "generation_config",
            "unsupported_parameter",
        )
    return fields


def ready_event(model_name: str) -> str:
    """What a `/load_model` of a model that is there streams: one event."""
    return f"data: {json.dumps({'status': 'ready', 'model': model_name, 'cached': True})}\n\n"
