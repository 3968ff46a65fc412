"""Ask a server very many things that nobody should ask: no answer is a 5xx, each refusal has OpenAI's shape.

Requests are made by a grammar over all routes and fields, then changed at the level of JSON values and of bytes, as a
function of the seed. They go straight to the ASGI application, some at the same time, with the demo model quantized to
MXFP4, once one request after the other and once with continuous batching. Faults are: a status of 5xx, an error inside
of a stream, a refusal that is no error object of OpenAI's, an exception that leaves the application, and no answer
within 60 s.

    python bench/serve_fuzz.py                  # 20,000 requests
    python bench/serve_fuzz.py --requests 500   # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutations import VALUES, mutate_bytes, mutate_value
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

AT_ONCE = 4
SECONDS = 60.0
TOKENS = 3
"""Most tokens that a request asks for if it is answered: what is tried is not the model."""
DEMO = Path(__file__).resolve().parents[1] / "loader" / "demo_model"

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


def nested(levels: int, of: Any = 1, name: str | None = "a") -> Any:
    """Objects, or lists without a name, in each other."""
    for _ in range(levels):
        of = [of] if name is None else {name: of}
    return of


class Grammar:
    """Requests as a function of the seed; half of the time right but for one field."""

    def __init__(self, seed: int | str) -> None:
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
            "response_format": lambda: self.pick({"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, 1),
            "tool_choice": lambda: self.pick("auto", "none", "required", {"type": "function"}, 1),
            "tools": lambda: [self.tool() for _ in range(self.pick(0, 1, 3))],
            "chat_template_kwargs": lambda: {self.pick(*VARIABLES): self.value()},
            "model": lambda: self.pick(None, self.text(), 1),
            "stream": lambda: self.pick(True, False, True, False, "x", 1, None),
            **dict.fromkeys(("user", "metadata", "store", "service_tier", "echo", "suffix", "functions", "modalities",
                             "parallel_tool_calls", "logit_biass", "prompt", "messages", "audio", "reasoning_effort",
                             "add_special_tokens", "add_generation_prompt", "return_token_strs", "tokens"), self.value),
            "\ud800": self.value,
        }  # fmt: skip

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def text(self) -> str:
        return self.pick(*TEXTS)

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

    def tool(self) -> Any:
        parameters = self.pick({"type": "object", "properties": {"a": {"type": "string"}}}, self.value())
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
        return self._short(body) if path.startswith("/v1/") else body

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
        path = self.pick(*["/v1/completions", "/v1/chat/completions"] * 5, "/tokenize", "/detokenize", "/load_model")
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


@dataclass(frozen=True)
class Request:
    """What is asked."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass
class Answer:
    """What came back: status 0 if nothing did, and what was raised."""

    status: int = 0
    body: bytes = b""
    raised: str = ""
    seconds: float = 0.0
    headers: dict[bytes, bytes] = field(default_factory=dict)


async def ask(app: Any, request: Request, seconds: float = SECONDS) -> Answer:
    """Send a request to an ASGI application."""
    answer, sent, begin = Answer(), False, time.perf_counter()
    forever = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await forever.wait()
        sent = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            answer.body += message.get("body", b"")

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": request.method, "scheme": "http", "path": request.path, "raw_path": request.path.encode(),
        "query_string": b"", "root_path": "", "headers": [(b"host", b"127.0.0.1"), *request.headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    try:
        await asyncio.wait_for(app(scope, receive, send), seconds)
    except TimeoutError:
        answer.raised = f"no answer within {seconds:g} s"
    except Exception as error:
        answer.raised = f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - begin
    return answer


def fault(request: Request, answer: Answer) -> str | None:
    """What is wrong with an answer, or None."""
    text = answer.body.decode("utf-8", "backslashreplace")
    if answer.raised:
        return answer.raised
    if not 200 <= answer.status < 500:
        return f"status {answer.status}: {text[:300]}"
    if answer.status == 200:
        return f"in a stream: {text[:300]}" if text.startswith("data: ") and '{"error"' in text else None
    if request.method == "HEAD":
        return None
    try:
        error = json.loads(answer.body)["error"]
        right = set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        right = right and isinstance(error["message"], str) and len(error["message"]) < 2100
    except (ValueError, KeyError, TypeError):
        right = False
    return None if right else f"not OpenAI's shape of an error: {text[:300]}"


async def fuzz(
    app: Any, seed: int | str, count: int, at_once: int = AT_ONCE
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Ask `count` requests of a seed: how many had which status, and the faults."""
    grammar, counts, faults = Grammar(seed), Counter[str](), list[dict[str, Any]]()
    for start in range(0, count, at_once):
        requests = [grammar.request() for _ in range(min(at_once, count - start))]
        answers = await asyncio.gather(*(ask(app, request) for request in requests))
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True), start):
            counts[f"{answer.status}"] += 1
            if answer.status == 400 and (param := json.loads(answer.body)["error"]["param"]) is not None:
                counts["named"] += bool(param)
            if (what := fault(request, answer)) is not None:
                said = {"number": number, "method": request.method, "path": request.path, "fault": what}
                faults.append({**said, "body": request.body[:500].decode("utf-8", "backslashreplace")})
    return counts, faults


def demo_app(batched: bool) -> tuple[Any, Any]:
    """The application over the demo model, and its state."""
    from quantload import LoadOptions, load_quantized
    from quantload.checkpoint.resolve import resolve
    from quantload.server import ServerState, create_app
    from quantload.server.processors import load_processor
    from quantload.server.warm_up import warm_up

    state = ServerState("demo", continuous_batching=batched)
    model = load_quantized(DEMO, "quark_mxfp4", options=LoadOptions(stats=False))
    state.finish(model, load_processor(resolve(DEMO), False), warm_up)
    return create_app(state, request_log="off"), state


def main() -> None:
    """Ask, print the table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="to each of the two servers, half of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    results = []
    for batched in (False, True):
        app, state = demo_app(batched)
        begin = time.perf_counter()
        counts, faults = asyncio.run(fuzz(app, f"{options.seed} {batched}", options.requests // 2))
        state.stop()
        for each in faults[:50]:
            print(" ", json.dumps(each)[:1000])
        results.append({"batched": batched, "requests": options.requests // 2, "counts": counts, "faults": faults,
                        "seconds": time.perf_counter() - begin})  # fmt: skip
    print(table(results))
    reduced = "" if options.requests >= 20_000 else "part"
    write_result("serve_fuzz", {"machine": machine, "seed": options.seed, "results": results}, options.results, reduced)
    raise SystemExit(1 if any(each["faults"] for each in results) else 0)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Counts of each server."""
    rows = []
    for result in results:
        counts = result["counts"]
        refused = sum(count for status, count in counts.items() if status.startswith("4"))
        rows.append(
            ["continuous batching" if result["batched"] else "one after the other", f"{result['requests']:,}",
             f"{counts['200']:,}", f"{refused:,}", f"{counts['named']:,}", f"{len(result['faults']):,}",
             f"{result['seconds']:.0f} s"]
        )  # fmt: skip
    return markdown(rows, ["requests", "number", "answered", "refused", "with `param`", "faults", "time"])


if __name__ == "__main__":
    main()
