"""Answers that keep to a JSON schema: which schema a request asks for, and the tokens that a grammar lets through.

llguidance makes the grammar of a schema and says at each step which tokens keep to it. It comes with the extra
`grammar`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from .answer_fields import read_flag
from .api_errors import ApiError, bad_request

# As `json.dumps` writes it: with white space wherever JSON allows it, some models write nothing else.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Constraint:
    """A JSON schema (as a text) that an answer has to keep to, asked for by `field`; `tools`: it is of tool calls."""

    schema: str
    field: str
    tools: bool = False


def read_constraint(fields: Mapping[str, Any], tools: list[dict[str, Any]] | None = None) -> Constraint | None:
    """What `response_format` or `tool_choice` ask for, None for an answer that is free. Raises `ApiError` (400)."""
    by_format = _of_format(fields.get("response_format"))
    by_choice = _of_choice(fields.get("tool_choice"), tools, parallel=_parallel(fields))
    if by_format is not None and by_choice is not None:
        raise bad_request("an answer cannot have a `response_format` and be a tool call", "response_format")
    found = by_format or by_choice
    if found is not None:
        if find_spec("llguidance") is None:
            raise bad_request(
                f"`{found.field}` needs the extra `grammar` where the server runs: pip install 'quantload[grammar]'",
                found.field,
                "unsupported_parameter",
            )
        for name in ("min_tokens", "ignore_eos"):
            if fields.get(name):
                raise bad_request(f"`{name}` cannot go with `{found.field}`, which says where the answer ends", name)
    return found


def _of_format(wanted: object) -> Constraint | None:
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if not isinstance(wanted, dict) or kind not in ("text", "json_object", "json_schema"):
        raise bad_request("`response_format.type` must be text, json_object or json_schema", "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint('{"type": "object"}', "response_format")
    named = wanted.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise bad_request("`response_format.json_schema.schema` must be an object", "response_format")
    return Constraint(json.dumps(schema), "response_format")


def _parallel(fields: Mapping[str, Any]) -> bool:
    allowed = fields.get("parallel_tool_calls") is None or read_flag(fields, "parallel_tool_calls")
    if not allowed and fields.get("tool_choice") in (None, "auto") and fields.get("tools"):
        raise bad_request(
            "`parallel_tool_calls`: false needs a `tool_choice` other than auto: a model that chooses is not held",
            "parallel_tool_calls",
            "unsupported_parameter",
        )
    return allowed


def _of_choice(choice: object, tools: list[dict[str, Any]] | None, parallel: bool) -> Constraint | None:
    if choice is None or choice in ("none", "auto"):
        return None
    functions = [_function(tool) for tool in tools or ()]
    if not functions:
        raise bad_request("`tool_choice` needs `tools` to choose from", "tool_choice")
    if choice != "required":
        name = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = name.get("name") if isinstance(name, dict) else None
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise bad_request(
                "`tool_choice` must be none, auto, required, or name a function that `tools` has", "tool_choice"
            )
        parallel = False
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}} | ({} if parallel else {"maxItems": 1})
    return Constraint(json.dumps(schema), "tool_choice", tools=True)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request("each of `tools` must have a `function` with a string `name`", "tools")
    if not isinstance(function.get("parameters"), dict | None):
        raise bad_request("the `parameters` of each of `tools` must be a JSON schema, an object", "tools")
    return function


class Grammars:
    """Grammars over the tokens of one model; made by any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int | None) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._lock = threading.Lock()

    @cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        size = max(self._vocabulary or 0, len(self._tokenizer))
        return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._tokenizer.eos_token_id)

    def processor(self, constraint: Constraint, config: GenerationConfig) -> GrammarProcessor:
        """What lets only such tokens through, for one answer. Raises `ApiError` (400)."""
        from llguidance import LLMatcher

        if (config.num_beams or 1) > 1:
            raise bad_request(
                f"`{constraint.field}` is not to be had from this model: its generation config searches with beams",
                constraint.field,
            )
        try:
            with self._lock:
                tokens = self._tokens
        except ValueError as error:
            raise bad_request(f"this model's tokenizer has no grammars: {error}", constraint.field) from error
        grammar = LLMatcher.grammar_from_json_schema(constraint.schema, overrides=SPACES)
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise bad_request(
                f"`{constraint.field}` has a schema that cannot be followed: {matcher.get_error()}", constraint.field
            )
        return GrammarProcessor(matcher, self._ends(config), constraint.field)

    def _ends(self, config: GenerationConfig) -> list[int]:
        ends = config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())


class GrammarProcessor(LogitsProcessor):  # type: ignore[misc]
    """Leaves one answer the tokens that its grammar allows next: all others get a logit of minus infinity.

    Where the grammar may end, so may the answer, with any of the model's `ends`. Raises `ApiError` (400, `field`) where
    the grammar leads to nothing, as that of a schema which wants itself inside of it.
    """

    def __init__(self, matcher: Any, ends: list[int], field: str) -> None:
        self.matcher = matcher
        self.ends = ends
        self.field = field
        self._seen: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self.matcher.is_stopped())

    def note(self, token: int) -> None:
        """`token` was generated. Raises `ApiError` where the grammar cannot go on behind it."""
        if token not in self.ends and not self.matcher.consume_token(token):
            raise self._dead_end(str(self.matcher.get_error()).partition("\n")[0])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")[:size]
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits.astype(np.bool_))
        allowed[[end for end in self.ends if end < size]] = self.matcher.is_accepting()
        masked = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if bool((masked == -torch.inf).all()):
            raise self._dead_end("no token of the model keeps to it")
        return masked

    def _dead_end(self, why: str) -> ApiError:
        return bad_request(f"`{self.field}` has a schema that no answer can keep to: {why}", self.field)


def tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls that an answer to a constraint of tools holds; None where it was cut off before its end."""
    try:
        calls = json.loads(text)
    except ValueError:
        return None
    return [{"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in calls]
