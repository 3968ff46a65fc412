"""The load page of a server, live while it loads, and what orchestrators ask: alive, ready, started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from ..memory.attempt import describe_failure
from ..page.charts import chart_data
from ..page.document import report_body
from ..page.failure import failure_body, failure_data
from .api_errors import ApiError
from .sign_in import sign_in_response
from .state import ServerState

EVENTS_A_SECOND = 4
MOST_FOLLOWERS = 32
"""Pages that are told of the load at the same time; each holds a connection."""


class PageRoutes:
    """`/`, and what its script asks for."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._followers = 0

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        return [
            Route("/", self.page),
            Route("/load_events", self.events),
            Route("/load_page", self.finished),
            Route("/livez", self.alive),
            Route("/readyz", self.ready),
            Route("/startupz", self.started),
        ]

    async def page(self, _request: Request) -> Response:
        return sign_in_response()

    async def finished(self, _request: Request) -> Response:
        """What stands in the page when the load has ended: title, HTML, and the data of the charts."""
        state = self.state
        if state.error is not None:
            failure = describe_failure(
                state.error, model=state.model_name, quantization=state.quantization, device=state.device
            )
            title, body, data = f"{state.model_name} was not loaded", failure_body(failure), failure_data(failure)
        else:
            state.served()
            report = state.report
            if not report:
                raise ApiError(404, "this model has no load report", code="no_load_report")
            title = f"{report['model']} as {report['quantization']}"
            body, data = await asyncio.to_thread(lambda: (report_body(report), chart_data(report)))
        return JSONResponse({"title": f"{title} - quantload", "html": body, "data": data})

    async def events(self, request: Request) -> Response:
        """Server-sent events: `moment` while it loads, then `ready` or `failed`, which is the last."""
        if self._followers >= MOST_FOLLOWERS:
            raise ApiError(
                429, "too many pages follow this load; /health says how far it is", code="too_many_followers"
            )
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._events(request), media_type="text/event-stream", headers=headers)

    async def _events(self, request: Request) -> AsyncIterator[str]:
        state = self.state
        self._followers += 1
        try:
            while state.status == "loading" and not state.cancel.is_set():
                yield _event("moment", {"model": state.model_name, **state.progress.now()})
                await asyncio.sleep(1 / EVENTS_A_SECOND)
                if await request.is_disconnected():
                    return
            if state.status != "loading":
                yield _event(state.status, {})
        finally:
            self._followers -= 1

    async def alive(self, _request: Request) -> Response:
        """200 unless only a new process helps: the load has failed, or the thread that generates is dead."""
        status, health = self.state.health()
        dead = status == 500 or (health["status"] == "unhealthy" and self.state.incomplete is None)
        return JSONResponse(_probe(health, "failed" if dead else "ok"), status_code=500 if dead else 200)

    async def ready(self, _request: Request) -> Response:
        """200 while requests are answered."""
        status, health = self.state.health()
        return JSONResponse(_probe(health, "ok" if status == 200 else health["status"]), status_code=min(status, 503))

    async def started(self, _request: Request) -> Response:
        """200 once the model was loaded and warm, 500 if it could not be; with the seconds of each phase."""
        state = self.state
        code = {"ready": 200, "loading": 503, "failed": 500}[state.status]
        said = {"status": "ok" if code == 200 else state.status, "model": state.model_name}
        return JSONResponse({**said, "phases": state.progress.phases()}, status_code=code)


def _probe(health: dict[str, Any], status: str) -> dict[str, Any]:
    return {"status": status, "model": health["model"]}


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
