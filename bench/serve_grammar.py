"""Requests that nobody should send, by a grammar over all routes and fields of a server, as a function of a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuzz_mutations import VALUES, mutate_bytes, mutate_value

TOKENS = 3
"""Most tokens that a request asks for if it is answered: what is tried is not the model."""
TEXTS: Sequence[str] = (
    "the", "", " ", "\x00", "\ud800", "a\udfffb", "🦊" * 9, "\uffff\ufeff", "<|im_start|>", "<|endoftext|>", "a" * 3000,
    "x y " * 600, "def f(x):", "hello", "{\n", "{{ 1 // 0 }}", "%s%n", "\r\n\r\n", "../../etc/passwd", "\u202e",
    "Z" + "\u0301" * 200,
)  # fmt: skip
NUMBERS: Sequence[Any] = (
    0, 1, 1, 1, 2, -1, 0.5, 0.5, 0.9, 1.0, 1e-5, 1e-6, 1e-40, 5e-324, -0.0, 1e300, -1e300, 1e999, float("nan"),
    2**31 - 1, 2**31, 2**63,
    2**64, -(2**63), 10**40, 10**400, 4095, 4096, True, None, "1", [1],
)  # fmt: skip
ROLES: Sequence[Any] = ("user", "system", "assistant", "tool", "developer", "wizard", "", "\ud800", 1, None)
KINDS: Sequence[Any] = ("text", "input_text", "output_text", "image_url", "input_audio", "video_url", "audio_url",
                        "refusal", "", None, 1, {}, ["text"])  # fmt: skip
VARIABLES: Sequence[str] = (
    "enable_thinking", "messages", "self", "tools", "documents", "chat_template", "tokenize", "return_tensors", "x",
    "images",
    "add_generation_prompt", "conversation", "raise_exception", "range", "bos_token", "loop", "x y", "", "\ud800",
    "text", "videos", "padding", "max_length", "processor_kwargs", "sanitize_control_tokens", "caller", "namespace",
)  # fmt: skip

CHOICE = {"type": "function", "function": {"name": "f"}}
PATTERNS = ("^a+$", "(a+)+$", "(a{999}){999}", "\\ud800", "(", "(?=a)b", "\\1", "[", "\\p{L}{500}", "a{99999999}")


def nested(levels: int, of: Any = 1, name: str | None = "a") -> Any:
    """Objects, or lists without a name, in each other."""
    for _ in range(levels):
        of = [of] if name is None else {name: of}
    return of


@dataclass(frozen=True)
class Request:
    """What is asked."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Grammar:
    """Requests as a function of the seed; half of the time right but for one field."""

    def __init__(self, seed: int | str, embeddings: int = 1) -> None:
        self.embeddings = embeddings
        self.rng = random.Random(f"requests {seed}")
        self._fields: dict[str, Callable[[], Any]] = {
            **dict.fromkeys(
                ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "seed", "n",
                 "presence_penalty", "best_of", "min_tokens", "logprobs", "top_logprobs", "max_tokens",
                 "max_completion_tokens"),
                self.number,
            ),
            "stop": lambda: self.pick(self.text(), [self.text()], [self.text()] * 17, [1], [], {}),
            "logit_bias": self.bias,
            "stop_token_ids": lambda: self.pick([self.token()], [self.token()] * 200, self.token(), ["1"], [None]),
            "stream_options": lambda: {self.pick("include_usage", "include_usage", "x"): self.pick(True, False, 1)},
            "generation_config": self.generation_config,
            "ignore_eos": lambda: self.pick(True, False, 1, None),
            "response_format": self.response_format,
            "tool_choice": lambda: self.pick("auto", "none", "required", "required", CHOICE, {"type": "function"}, 1),
            "tools": lambda: [self.tool() for _ in range(self.pick(0, 1, 3))],
            "chat_template_kwargs": lambda: {self.pick(*VARIABLES): self.value()},
            "encoding_format": lambda: self.pick("float", "base64", self.text(), 1, []),
            "dimensions": self.number,
            "input": self.prompt,
            "model": lambda: self.pick(None, self.text(), 1),
            "stream": lambda: self.pick(True, False, True, False, "x", 1, None),
            **dict.fromkeys(("user", "metadata", "store", "service_tier", "echo", "suffix", "functions", "modalities",
                             "logit_biass", "prompt", "messages", "audio", "reasoning_effort",
                             "add_special_tokens", "add_generation_prompt", "return_token_strs", "tokens"), self.value),
            "\ud800": self.value,
        }  # fmt: skip

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def text(self) -> str:
        return self.rng.choice(TEXTS)

    def number(self) -> Any:
        return self.pick(*NUMBERS)

    def token(self) -> Any:
        return self.pick(0, 5, 300, 4095, 4096, 2**31 - 1, 2**31, -1, 2**70)

    def value(self) -> Any:
        many = (self.text(), self.number(), nested(self.pick(3, 63, 70, 200)), nested(70, name=None), [self.text()])
        return self.pick(*many, *VALUES)

    def bias(self) -> Any:
        keys = ("1", "01", "-1", "1.0", "4095", "4096", "999999999", "99999999999", "a", "", "\u0663", "1e3", "\ud800")
        return self.pick({self.pick(*keys): self.number()}, {str(token): -100 for token in range(600)}, [1])

    def generation_config(self) -> Any:
        config = {self.pick("temperature", "max_new_tokens", "eos_token_id", "num_beams", "do_sample"): self.number()}
        return self.pick(json.dumps(config), self.text(), config, "[" * 5000, '{"temperature": 1e999}')

    def response_format(self) -> Any:
        named = {"name": "x", "schema": self.schema()}
        wanted = {"type": "json_schema", "json_schema": named}
        return self.pick(
            wanted, wanted, {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": []}, 1
        )

    def schema(self) -> Any:
        """A JSON schema, which may contradict itself, recur, be endless or no schema."""
        schemas: tuple[Any, ...] = (
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {"type": "integer"},
            {"type": "integer", "minimum": self.number(), "maximum": self.number()}, {"enum": []}, {"$ref": "#"},
            {"const": self.value()}, {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            {"enum": [self.value(), self.value()]}, {"type": "string", "pattern": self.pick(*PATTERNS)},
            {"type": "string", "minLength": 9, "maxLength": 1}, {"type": "array", "minItems": self.number()},
            {"type": "string", "format": self.pick("date", "email", "uri", self.text())}, {"not": {}},
            {"$ref": self.pick("#/x", "http://127.0.0.1:9/", "file:///etc/passwd")}, {"allOf": [{"type": "null"}] * 9},
            {"anyOf": []}, {"type": self.value()}, {"multipleOf": self.number(), "type": "number"}, {}, False,
            {"type": "object", "required": ["x"], "additionalProperties": False}, {"const": "\ud83e"}, {"allOf": 1},
            {"type": "object", "properties": {str(number): {} for number in range(900)}}, nested(60, {}, "not"),
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, self.value(),
        )  # fmt: skip
        return self.pick(*schemas)

    def tool(self) -> Any:
        parameters = self.schema()
        function = {"name": self.pick("f", self.text(), None), "description": "d", "parameters": parameters}
        return self.pick({"type": "function", "function": function}, {"type": "function"}, self.value())

    def content(self) -> Any:
        part = {"type": self.pick("text", *KINDS), "text": self.text()}
        url = self.pick("data:image/png;base64,AA==", "http://127.0.0.1:9/", "/etc/passwd", "data:,", 1)
        media = {"type": self.pick(*KINDS), "image_url": {"url": url}, "input_audio": {"data": "AA==", "format": "wav"}}
        return self.pick(self.text(), self.text(), [part], [part, part], [media], self.value())

    def call(self) -> Any:
        arguments = self.pick('{"a": 1}', {"a": 1}, '{"a": "\\ud800"}', "[" * 5000, '{"a":' * 70 + "1" + "}" * 70,
                              nested(60), "{", "3", '{"a": NaN}', '{"a": 1e999}', self.value())  # fmt: skip
        function = {"name": self.pick("f", self.text(), 1), "arguments": arguments}
        return self.pick({"id": "1", "type": "function", "function": function}, {"function": function}, self.value())

    def message(self) -> Any:
        message: dict[str, Any] = {"role": self.pick("user", "assistant", *ROLES), "content": self.content()}
        if self.rng.random() < 0.2:
            message["tool_calls"] = self.pick([self.call()], [], None, self.value())
        if self.rng.random() < 0.1:
            message[self.pick("tool_call_id", "name", "reasoning_content", "x")] = self.value()
        return self.pick(message, message, message, self.value())

    def prompt(self) -> Any:
        tokens = [self.token() for _ in range(3)]
        return self.pick(
            self.text(), [self.text(), "a"], tokens, [tokens, [1]], [[]], ["a", 1], [1] * 1500, self.value()
        )

    def base(self, path: str) -> dict[str, Any]:
        """A right request."""
        if path == "/v1/chat/completions":
            return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": TOKENS}
        if path == "/detokenize":
            return {"tokens": [1, 2, 3]}
        if path == "/v1/embeddings":
            return {"input": "the"}
        return {"prompt": "the", **({"max_tokens": TOKENS} if path == "/v1/completions" else {})}

    def body(self, path: str) -> Any:
        body = self.base(path)
        for _ in range(self.pick(0, 1, 1, 1, 1, 2, 3)):
            name = self.pick(*self._fields)
            body[name] = self._fields[name]()
        draw = self.rng.random()
        if draw < 0.25 and path == "/detokenize":
            body["tokens"] = [self.token() for _ in range(4)]
        elif draw < 0.25:
            name = "messages" if "messages" in body else "prompt"
            body[name] = self.prompt() if name == "prompt" else [self.message() for _ in range(self.pick(1, 1, 2, 4))]
        elif draw < 0.35:
            body, _ = mutate_value(self.rng, body, list(self._fields))
        if isinstance(body, dict) and "chat" in path and self.rng.random() < 0.8:
            body.pop("prompt", None)
        if isinstance(body, dict) and path == "/v1/completions" and self.rng.random() < 0.8:
            body.pop("messages", None)
        return self._short(body) if "completions" in path else body

    @staticmethod
    def _short(body: Any) -> Any:
        """Few tokens, where more were a right thing to ask for."""
        if not isinstance(body, dict):
            return body
        for name in ("max_tokens", "max_completion_tokens"):
            value = body.get(name)
            if value is None or (type(value) is int and TOKENS < value < 2**31):
                body.pop(name, None)
        if not {"max_tokens", "max_completion_tokens"} & body.keys():
            body["max_tokens"] = TOKENS
        if type(body.get("n")) is int and 4 < body["n"] <= 128:
            body["n"] = 4
        return body

    def request(self) -> Request:
        path = self.pick(*["/v1/completions", "/v1/chat/completions"] * 5, "/tokenize", "/detokenize", "/load_model",
                         *["/v1/embeddings"] * self.embeddings)  # fmt: skip
        if self.rng.random() < 0.08:
            return self.other()
        body = self.body(path)
        data = json.dumps(body, ensure_ascii=self.rng.random() < 0.8).encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.05:
            data = mutate_bytes(self.rng, data, ())
        return Request("POST", path, data)

    def other(self) -> Request:
        """Another route, method or header."""
        path = self.pick("/v1/models", "/v1/models/demo", "/v1/models/\ufffd/x", "/health", "/version", "/load_report",
                         "/metrics", "/", "/v1/completions", "/v1/models/../../etc", "/tokenize", "/\x00")  # fmt: skip
        method = self.pick("GET", "GET", "GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE", "\xff")
        name = self.pick(
            b"accept", b"content-length", b"content-type", b"host", b"authorization", b"range", b"x-request-id"
        )
        value = self.pick(b"", b"\xff\xfe", b"-1", b"a" * 5000, b"application/openmetrics-text; version=9", b"bytes=0-")
        return Request(method, path, self.pick(b"", b"{}", b"\xff"), ((name, value),))
