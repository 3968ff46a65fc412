"""One answer to a request out of transformers' answers, of which there is one for each prompt and each of `n`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from .api_errors import ApiError
from .generation_request import GenerationRequest
from .grammar import tool_calls
from .logprobs import TokenLog, TokenTexts, chat_logprobs, completion_logprobs

Run = Callable[[GenerationRequest, str], Awaitable[Response]]
Piece = tuple[int, str]


async def answer(run: Run, request: GenerationRequest, request_id: str, texts: TokenTexts) -> Response:
    """The whole response, or its stream of events. `run` answers one part of the request, given an id of its own.

    Raises the `ApiError` of the first part that has one, after the others were told to end.
    """
    parts = request.parts()
    choices = [Choice(index, part, texts) for index, part in enumerate(parts)]
    ids = [request_id] if len(parts) == 1 else [f"{request_id}-{index}" for index in range(len(parts))]
    responses = await _all(run, parts, ids)
    head = {"id": request_id, "created": int(time.time())}
    if request.stream:
        iterators = [response.body_iterator for response in responses if isinstance(response, StreamingResponse)]
        return StreamingResponse(_events(iterators, choices, request, head), media_type="text/event-stream")
    bodies = [json.loads(bytes(response.body)) for response in responses]
    whole = {**bodies[0], **head}
    whole["choices"] = [choice.whole(body["choices"][0]) for choice, body in zip(choices, bodies, strict=True)]
    whole["usage"] = sum_usage([body["usage"] for body in bodies], request.n)
    return JSONResponse(whole)


async def _all(run: Run, parts: list[GenerationRequest], ids: list[str]) -> list[Response]:
    async def one(part: GenerationRequest, part_id: str) -> Response:
        try:
            return await run(part, part_id)
        except BaseException:
            part.cancelled.set()  # which all of them share
            raise

    results = await asyncio.gather(*map(one, parts, ids), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in errors:  # those that ended only because another failed say nothing of interest
        if not (isinstance(error, ApiError) and error.code == "request_cancelled"):
            raise error
    if errors:
        raise errors[0]
    return [result for result in results if isinstance(result, Response)]


class Choice:
    """One choice of an answer: transformers' JSON of it, with its index and the likelihood of its tokens."""

    def __init__(self, index: int, part: GenerationRequest, texts: TokenTexts) -> None:
        self.index = index
        self.chat = "messages" in part.body
        self.usage: dict[str, int] | None = None
        self._log = TokenLog(part.chosen, texts) if part.logprobs is not None else None
        self._texts = texts
        self._calls = part.constraint is not None and part.constraint.tools
        self._text = ""
        self._cut = bool(part.stop)  # tokens of a stop string are generated, and not sent
        self._length = 0

    def whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        text = choice["message"].get("content") if self.chat else choice["text"]
        logprobs = self._logprobs(text or "")
        calls = tool_calls(text or "") if self._calls else None
        if calls is not None:
            message = {"role": "assistant", "content": None, "tool_calls": [_as_call(call) for call in calls]}
            choice = {**choice, "message": message, "finish_reason": "tool_calls"}
        return {**choice, "index": self.index, "logprobs": logprobs}

    def delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The choice of one event of a stream; call it in their order."""
        text = choice["delta"].get("content") if self.chat else choice["text"]
        logprobs = self._logprobs(text or "")
        if self._calls:
            choice = self._with_calls(choice, text or "")
        return {"finish_reason": None, **choice, "index": self.index, "logprobs": logprobs}

    def _with_calls(self, choice: dict[str, Any], text: str) -> dict[str, Any]:
        """An event of an answer that is calls: they come with the last, and what was cut off as the text that it is."""
        self._text += text
        delta = {name: value for name, value in choice["delta"].items() if name != "content"}
        if choice.get("finish_reason") is None:
            return {**choice, "delta": delta}
        calls = tool_calls(self._text)
        if calls is None:
            return {**choice, "delta": {**delta, "content": self._text}}
        delta["tool_calls"] = [{"index": index, **_as_call(call)} for index, call in enumerate(calls)]
        return {**choice, "delta": delta, "finish_reason": "tool_calls"}

    def _logprobs(self, text: str) -> dict[str, Any] | None:
        if self._log is None:
            return None
        self._length += len(text)
        tokens = self._log.take(self._length if self._cut else None)
        return (chat_logprobs if self.chat else completion_logprobs)(tokens, self._texts)


def _as_call(function: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def sum_usage(usages: list[dict[str, int]], n: int) -> dict[str, int]:
    """The tokens of all choices; a prompt counts once, however many (`n`, one after the other) answer it."""
    prompt = sum(usage["prompt_tokens"] for usage in usages[::n])
    completion = sum(usage["completion_tokens"] for usage in usages)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(
    iterators: list[Any], choices: list[Choice], request: GenerationRequest, head: dict[str, Any]
) -> AsyncIterator[str]:
    """The events of all choices as they come, then one with the usage if it was asked for."""
    usage_field = {"usage": None} if request.include_usage else {}
    last: dict[str, Any] = {}
    pieces = _in_turns(iterators) if len(iterators) > 1 else _alone(iterators[0])
    try:
        async for index, piece in pieces:
            for line in filter(None, piece.split("\n\n")):
                last = json.loads(line.removeprefix("data: ")) | head
                usage = last.pop("usage", None)
                if usage is not None:
                    choices[index].usage = usage
                yield _event(last | {"choices": [choices[index].delta(last["choices"][0])]} | usage_field)
    finally:
        await pieces.aclose()
    usages = [choice.usage for choice in choices if choice.usage is not None]
    if request.include_usage:
        yield _event(last | {"choices": [], "usage": sum_usage(usages, request.n)})


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _alone(pieces: Any) -> Any:
    try:
        async for piece in pieces:
            yield 0, piece
    finally:
        await pieces.aclose()


async def _in_turns(iterators: list[Any]) -> Any:
    """Pieces of several streams in the order in which they arrive; the error of any ends all."""
    arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(2 * len(iterators))

    async def pump(index: int, pieces: Any) -> None:
        try:
            async for piece in pieces:
                await arrived.put((index, piece))
        except Exception as error:
            await arrived.put(error)
        else:
            await arrived.put(None)

    tasks = [asyncio.create_task(pump(index, pieces)) for index, pieces in enumerate(iterators)]
    open_streams = len(tasks)
    try:
        while open_streams:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pieces in iterators:
            await pieces.aclose()
