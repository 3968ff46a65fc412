"""The HTTP application: exactly the routes listed in `create_app`."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from ..errors import PolicyError
from .admission import Place
from .api_errors import ApiError, on_api_error, on_crash, on_http_exception
from .auth import BearerAuth, checked_key
from .bodies import Bodies
from .embeddings import parse_embedding
from .generation import GenerationFailed, as_api_error
from .generation_request import GenerationRequest, checked_fields, parse_chat, parse_completion
from .hosts import HostCheck, checked_hosts
from .json_values import parse_json
from .openapi import description
from .page_routes import PageRoutes
from .request_log import USAGE, RequestLog, RequestLogMode
from .size_limits import ALL_BODIES
from .state import ServerState
from .token_routes import detokenize, tokenize
from .transformers_chat import ready_event
from .transformers_serving import ServedModel
from .weights import WeightRoutes

DISCONNECT_POLL_SECONDS = 0.25

Parse = Callable[[object, str], GenerationRequest]
Answer = Callable[[ServedModel, GenerationRequest, str], Awaitable[Response]]


def create_app(
    state: ServerState,
    api_key: str | None = None,
    request_log: RequestLogMode = "all",
    allowed_hosts: Collection[str] | None = None,
    weights: WeightRoutes | None = None,
) -> Starlette:
    """The ASGI application over a `ServerState`; it can answer before the model is there.

    With an `api_key` all routes but the probes want it as a bearer token. `request_log` says which requests have a
    line in the log: `all`, those that are no probes, or none (`off`). With `allowed_hosts`, names without port,
    requests for another name are refused; those of this machine itself are always allowed. Shutting down ends the
    generations. Raises `PolicyError` for a key that no client can send, or a name that is none.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(state.stop)
        if weights is not None:
            await weights.stop()

    endpoints = _Endpoints(state)
    routes: list[BaseRoute] = [
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"]),
        Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model:path}", endpoints.model),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/load_model", endpoints.load_model, methods=["POST"]),
        Route("/version", endpoints.version),
        Route("/openapi.json", endpoints.openapi),
        Route("/load_report", endpoints.load_report),
        Route("/metrics", endpoints.metrics),
        Route("/health", endpoints.health),
        *PageRoutes(state).routes(),
    ]
    if weights is not None:
        if api_key is None:
            raise PolicyError("weights are exchanged over HTTP only with an API key; give one with --api-key-file")
        routes += (exchanging := weights.routes(state))
        endpoints.weight_routes = [route.path for route in exchanging]
    middleware = [Middleware(RequestLog, metrics=state.metrics, routes=routes, mode=request_log)]  # outside of all
    if allowed_hosts is not None:
        middleware.append(Middleware(HostCheck, allowed=checked_hosts(allowed_hosts)))
    if api_key is not None:
        middleware.append(Middleware(BearerAuth, api_key=checked_key(api_key)))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_exception, Exception: on_crash},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # one spelling each: anything else is a 404
    return app


class _Endpoints:
    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.bodies = Bodies(ALL_BODIES)
        self.weight_routes: list[str] = []

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, parse_completion, ServedModel.complete, "cmpl")

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, parse_chat, ServedModel.chat, "chatcmpl")

    async def embeddings(self, request: Request) -> Response:
        served = self.state.served()
        async with self.bodies.body(request, served.limits.body_bytes) as body:
            parsed = await served.workers.run(lambda: parse_embedding(parse_json(body), served.name), len(body))
        await self.state.admission.opened()
        place = self.state.served_admission().enter()
        try:
            return JSONResponse(await served.embed(parsed, len(body)))
        finally:
            place.leave()

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        entry = self._model()
        checked_fields({"model": request.path_params["model"]}, self.state.model_name, {"model"})
        return JSONResponse(entry)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.state.model_name,
            "object": "model",
            "created": self.state.created,
            "owned_by": "quantload",
            "max_model_len": self.state.served().context,
        }

    async def tokenize(self, request: Request) -> Response:
        return JSONResponse(await self._told(request, tokenize))

    async def detokenize(self, request: Request) -> Response:
        return JSONResponse(await self._told(request, detokenize))

    async def load_model(self, request: Request) -> Response:
        await self._told(request, lambda served, body: checked_fields(body, served.name, {"model"}))
        return Response(ready_event(self.state.model_name), media_type="text/event-stream")

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(description(metadata.version("quantload"), self.weight_routes))

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": metadata.version("quantload")})

    async def load_report(self, _request: Request) -> Response:
        self.state.served()
        return JSONResponse(self.state.report)

    async def metrics(self, request: Request) -> Response:
        metrics, accept = self.state.metrics, request.headers.get("accept", "")
        text = await asyncio.to_thread(metrics.render, accept)
        return Response(text, headers={"Content-Type": metrics.content_type(accept)})

    async def health(self, _request: Request) -> Response:
        status, body = self.state.health()
        headers = self.state.retry_after() if body["status"] == "loading" else None
        return JSONResponse(body, status_code=status, headers=headers)

    async def _generate(self, request: Request, parse: Parse, answer: Answer, prefix: str) -> Response:
        served = self.state.served()
        async with self.bodies.body(request, served.limits.body_bytes) as body:
            parsed = await served.workers.run(lambda: parse(parse_json(body), self.state.model_name), len(body))
            parsed = replace(parsed, usage=request.scope[USAGE], nbytes=len(body))
        await self.state.admission.opened()
        place = self.state.served_admission().enter()
        try:
            work = answer(served, parsed, f"{prefix}-{uuid.uuid4().hex}")
            return _CancelWhenSent(await _unless_gone(request, work, parsed), parsed, place)
        except BaseException:
            place.leave()
            raise

    async def _told(self, request: Request, work: Callable[[ServedModel, object], dict[str, Any]]) -> dict[str, Any]:
        """What `work` makes of the body of a request that generates nothing."""
        served = self.state.served()
        async with self.bodies.body(request, served.limits.body_bytes) as body:
            return await served.workers.run(lambda: work(served, parse_json(body)), len(body))


class _CancelWhenSent(Response):
    """A response after which, however it ended, the generation behind it has no reader."""

    def __init__(self, inner: Response, parsed: GenerationRequest, place: Place) -> None:
        self.inner = inner
        self.parsed = parsed
        self.place = place
        self.background = None
        if isinstance(inner, StreamingResponse):
            inner.body_iterator = _finish_stream(inner.body_iterator)
            inner.headers["Cache-Control"] = "no-cache"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.inner(scope, receive, send)
        finally:
            self.parsed.cancelled.set()
            self.place.leave()


async def _finish_stream(events: Any) -> AsyncIterator[str | bytes | memoryview]:
    """The handler's SSE events, an error as an event of its own, and the `[DONE]` OpenAI clients wait for."""
    try:
        async for event in events:
            yield event
    except GenerationFailed as error:
        yield f"data: {json.dumps(as_api_error(error).body())}\n\n"
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Awaitable[Response], parsed: GenerationRequest) -> Response:
    """Wait for an answer; once the client has hung up, let the generation behind it end early."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=DISCONNECT_POLL_SECONDS))[0]:
            if not parsed.cancelled.is_set() and await request.is_disconnected():
                parsed.cancelled.set()
        return task.result()
    except BaseException:
        parsed.cancelled.set()
        raise
