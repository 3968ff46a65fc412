"""JSON schemas of what requests may hold, as `generation_request` and `token_routes` read them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .answer_fields import MAX_CHOICES, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS
from .embeddings import EMBEDDING_FIELDS
from .generation_request import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    INERT,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    ONLY_DEFAULT,
)
from .messages import MEDIA_PARTS, TEXT_PARTS
from .token_routes import DETOKENIZE_FIELDS, TOKENIZE_FIELDS

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """A schema that stands elsewhere, by name."""
    return {"$ref": f"#/components/schemas/{name}"}


MOST = 2**31 - 1
TOKEN = {"type": "integer", "minimum": 0, "maximum": MOST}
TOKENS = {"type": "array", "items": TOKEN}


def _or_null(schema: Schema, text: str = "") -> Schema:
    """A field that may also be null, which is the same as leaving it out."""
    described = {"description": text} if text else {}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"], **described}
    return {"anyOf": [schema, {"type": "null"}], **described}


def _number(low: float, high: float, text: str, **more: Any) -> Schema:
    return _or_null({"type": "number", "minimum": low, "maximum": high, **more}, text)


def _integer(low: int, high: int, text: str) -> Schema:
    return _or_null({"type": "integer", "minimum": low, "maximum": high}, text)


_FLAG: Schema = {"type": "boolean"}
_PLAIN_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "description": "As the model's chat template knows them: user, assistant, system"},
        "content": _or_null(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"$ref": "#/components/schemas/ContentPart"}},
                ]
            }
        ),
        "tool_calls": _or_null({"type": "array", "items": {"$ref": "#/components/schemas/ToolCall"}}),
    },
}

PARTS: dict[str, Schema] = {
    "Message": _PLAIN_MESSAGE,
    "ContentPart": {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": sorted(TEXT_PARTS | MEDIA_PARTS)}, "text": {"type": "string"}},
        "description": "`text` for text; for models that read them, image_url, video_url, audio_url with a data: URL",
    },
    "ToolCall": {
        "type": "object",
        "required": ["function"],
        "properties": {
            "function": {
                "type": "object",
                "required": ["name", "arguments"],
                "properties": {
                    "name": {"type": "string"},
                    "arguments": {"anyOf": [{"type": "string", "description": "a JSON object"}, {"type": "object"}]},
                },
            }
        },
    },
    "StreamOptions": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "include_usage": _or_null(_FLAG, "Whether an event with the usage ends the stream"),
            "include_obfuscation": _or_null(_FLAG, "Taken and not used"),
            "continuous_usage_stats": {"enum": [False, None]},
        },
    },
}

_SAMPLING: dict[str, Schema] = {
    "model": _or_null({"type": "string"}, "The name that is served; any other is a 404"),
    "stream": _or_null(_FLAG, "Whether the answer comes as server-sent events, the last of them `[DONE]`"),
    "stream_options": _or_null({"$ref": "#/components/schemas/StreamOptions"}, "Only with `stream`: true"),
    "max_tokens": _integer(1, MOST, "The most tokens to generate"),
    "temperature": {
        "anyOf": [
            {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 2},
            {"enum": [0]},
            {"type": "null"},
        ],
        "description": "0: the most likely token, always. Left out: as the model's generation config says",
    },
    "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": _integer(0, MOST, "0: no limit"),
    "min_p": _number(0, 1, "Share of the most likely token's probability that a token must have"),
    "repetition_penalty": _number(MIN_REPETITION_PENALTY, 10, "1: none"),
    "frequency_penalty": _number(-2, 2, "Taken off a token's logit for each time it was generated"),
    "presence_penalty": _number(-2, 2, "Taken off a token's logit once it was generated"),
    "seed": _integer(-(2**63), 2**63 - 1, "The second of `n` answers has the seed after it"),
    "logit_bias": _or_null(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        },
        "Token ids with what is added to their logits",
    ),
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": 1000},
            {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1, "maxLength": 1000}},
            {"type": "null"},
        ],
        "description": "Texts that end the answer, which does not have them",
    },
    "min_tokens": _integer(0, MOST, "Tokens before which no end of text and none of `stop_token_ids` comes"),
    "ignore_eos": _or_null(_FLAG, "Whether the end of text is a token like any other"),
    "stop_token_ids": _or_null({**TOKENS, "maxItems": MAX_STOP_TOKENS}, "Tokens that end the answer, which has them"),
    "response_format": _or_null(
        {
            "anyOf": [
                {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}},
                {
                    "type": "object",
                    "required": ["type", "json_schema"],
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {
                            "type": "object",
                            "required": ["schema"],
                            "properties": {"schema": {"type": "object"}},
                        },
                    },
                },
            ]
        },
        "JSON, or JSON of a schema; needs the extra `grammar`",
    ),
    "n": _integer(1, MAX_CHOICES, f"Answers to each prompt; {MAX_CHOICES} for all prompts together at most"),
    "generation_config": _or_null(
        {"type": "string"}, "JSON of a transformers GenerationConfig, as its clients send it"
    ),
}
_SAMPLING |= {name: {"description": "Taken and not used"} for name in INERT}
_SAMPLING |= {
    name: {"enum": [*values, None], "description": "No other value is supported"}
    for name, values in ONLY_DEFAULT.items()
}
_TOOLS = _or_null({"type": "array", "items": {"type": "object"}}, "As the chat template wants them")
_VARIABLES = _or_null({"type": "object"}, "Variables for the chat template")
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {"$ref": "#/components/schemas/Message"},
    "examples": [[{"role": "user", "content": "class Stack:"}]],
}

_COMPLETION: dict[str, Schema] = {
    "prompt": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": {"type": "string"}},
            {**TOKENS, "minItems": 1},
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": {**TOKENS, "minItems": 1}},
        ],
        "description": "A text, several, the ids of a text's tokens, or several such lists",
        "examples": ["def read_lines(path):", ["class Stack:", "import "], [1, 2, 3]],
    },
    "logprobs": _integer(0, MAX_TOP_LOGPROBS, "Likely tokens to tell for each that was generated"),
}
_CHAT: dict[str, Schema] = {
    "messages": _MESSAGES,
    "tools": _TOOLS,
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required", None]},
            {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"const": "function"},
                    "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                },
            },
        ],
        "description": "Whether the answer is a call of `tools`; all but none and auto need the extra `grammar`",
    },
    "parallel_tool_calls": _or_null(_FLAG, "Whether there may be several; false is for required alone"),
    "chat_template_kwargs": _VARIABLES,
    "max_completion_tokens": _integer(1, MOST, "The newer name of `max_tokens`"),
    "logprobs": _or_null(_FLAG, "Whether to tell how likely the tokens of the answer were"),
    "top_logprobs": _integer(0, MAX_TOP_LOGPROBS, "Likely tokens to tell for each; only with `logprobs`: true"),
}
_TOKENIZE: dict[str, Schema] = {
    "model": _SAMPLING["model"],
    "prompt": _or_null({"type": "string"}, "A text; or `messages`, not both"),
    "messages": _or_null(_MESSAGES),
    "add_special_tokens": _or_null(_FLAG, "For `prompt`: with those that begin and end a text, unless false"),
    "add_generation_prompt": _or_null(_FLAG, "For `messages`: with the beginning of an answer, unless false"),
    "return_token_strs": _or_null(_FLAG, "Whether to give the vocabulary's entries, too"),
    "tools": _TOOLS,
    "chat_template_kwargs": _VARIABLES,
}


def _object(properties: dict[str, Schema], names: Collection[str], required: list[str]) -> Schema:
    """An object that has none but these fields."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": {name: properties[name] for name in sorted(names)},
    }


_EMBEDDING: dict[str, Schema] = {
    "model": _SAMPLING["model"],
    "input": _COMPLETION["prompt"],
    "encoding_format": {"enum": ["float", "base64", None], "description": "base64: of little-endian float32"},
    "dimensions": {"enum": [None], "description": "A vector has all that the model gives"},
    "user": _SAMPLING["user"],
}

REQUESTS: dict[str, Schema] = {
    "EmbeddingRequest": _object(_EMBEDDING, EMBEDDING_FIELDS, ["input"]),
    "CompletionRequest": _object(_SAMPLING | _COMPLETION, COMPLETION_FIELDS, ["prompt"]),
    "ChatRequest": _object(_SAMPLING | _CHAT, CHAT_FIELDS, ["messages"]),
    "TokenizeRequest": _object(_TOKENIZE, TOKENIZE_FIELDS, []),
    "DetokenizeRequest": _object({"model": _SAMPLING["model"], "tokens": TOKENS}, DETOKENIZE_FIELDS, ["tokens"]),
    "LoadModelRequest": _object({"model": _SAMPLING["model"]}, {"model"}, []),
}
