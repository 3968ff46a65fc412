"""The routes that exchange the weights of the model that is served: from a folder, or as a trainer sends them.

Requests that are under way are answered with the old weights; those that come meanwhile wait for the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import LoadCancelledError, PolicyError, QuantloadError
from ..local_paths import local_path
from ..memory.metrics import LoadMetrics
from ..memory.report import LoadReport
from ..progress import Progress
from ..ranks.lockstep import Leader
from ..reload.flow import reload_weights
from ..reload.living import refusal
from ..reload.packed import PackedTensors
from ..reload.update import WeightUpdate
from .api_errors import ApiError, bad_request
from .bodies import Bodies
from .json_values import parse_json
from .state import ServerState

logger = logging.getLogger("quantload")

MOST_BYTES = 256 << 20
"""Bytes of the tensors in one request; there may be any number of requests."""
SMALL_BYTES = 64 << 10
IDLE_SECONDS = 600.0
"""How long an update may wait for its next request, while all others wait for it."""
RELOAD, START, UPDATE, FINISH = "/reload", "/start_weight_update", "/update_weights", "/finish_weight_update"
RELOAD_FIELDS = {"checkpoint": str, "adapter": str, "partial": bool}
START_FIELDS = {"partial": bool}
FINISH_FIELDS = {"weight_version": str}
_SHARED_NAME = re.compile(r"/?[A-Za-z0-9_.-]{1,200}")
T = TypeVar("T")


class Wanted(NamedTuple):
    """What a request to `/reload` asks for."""

    folder: Path
    partial: bool
    adapter: Path | None


Reload = Callable[[Any, Wanted, Progress | bool], LoadReport]


class WeightRoutes:
    """Which of the routes there are: `/reload` for checkpoints below `reload_root`, and with `updates` a trainer's.

    Raises `PolicyError` for a root that is no folder.
    """

    def __init__(self, reload_root: Path | None, updates: bool, metrics: LoadMetrics | None = None) -> None:
        self.updates, self.metrics = updates, metrics
        self.root: Path | None = None
        if reload_root is not None:
            self.root = local_path(reload_root, "--reload-root", PolicyError).resolve()
            if not self.root.is_dir():
                raise PolicyError(f"--reload-root is {str(reload_root)!r}, which is no folder")
        self.reload: Reload = _reload
        self._exchange: _Exchange | None = None

    def reload_together(self, leader: Leader) -> None:
        """Have the other ranks of the model reload it, too."""
        self.reload = functools.partial(_reload_together, leader)

    def routes(self, state: ServerState) -> list[Route]:
        """The routes, over the model of a server."""
        exchange = self._exchange = _Exchange(state, self)
        found = [] if self.root is None else [Route(RELOAD, exchange.reload, methods=["POST"])]
        if self.updates:
            found += [
                Route(START, exchange.start, methods=["POST"]),
                Route(UPDATE, exchange.update, methods=["POST"]),
                Route(FINISH, exchange.finish, methods=["POST"]),
            ]
        return found

    async def stop(self) -> None:
        """Give an update up that is under way."""
        if self._exchange is not None:
            await self._exchange.give_up("the server stops")


class _Exchange:
    """What the routes do."""

    def __init__(self, state: ServerState, given: WeightRoutes) -> None:
        self._state, self._given, self._root, self._metrics = state, given, given.root, given.metrics
        self._bodies = Bodies(2 * MOST_BYTES)
        self._update: WeightUpdate | None = None
        self._held = contextlib.AsyncExitStack()
        self._turn = asyncio.Lock()
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._giving_up: asyncio.Task[None] | None = None

    async def reload(self, request: Request) -> Response:
        """`{"checkpoint": "step-200"}`, a folder below the root; `adapter` is another, `partial` true or false."""
        model = self._state.served().model
        asked = await self._fields(request, RELOAD_FIELDS)
        if "checkpoint" not in asked:
            raise bad_request("`checkpoint` is missing; name a folder below the one that the server was given")
        folder = await asyncio.to_thread(self._below, "checkpoint", asked["checkpoint"])
        adapter = asked.get("adapter")
        if adapter is not None:
            adapter = await asyncio.to_thread(self._below, "adapter", adapter)

        def progress(_done: int, _total: int) -> None:
            if self._state.cancel.is_set():
                raise LoadCancelledError("the server was told to stop while the weights were reloaded")

        async with self._state.admission.drained():
            self._begin()
            wanted = Wanted(folder, asked.get("partial", False), adapter)
            report = await self._do(lambda: self._given.reload(model, wanted, progress))
            self._end("success")
        return JSONResponse({"message": "Weights reloaded", **_told(report, self._began)})

    async def start(self, request: Request) -> Response:
        """Begin an update; with `{"partial": true}` what does not come stays as it is."""
        model = self._state.served().model
        partial = (await self._fields(request, START_FIELDS)).get("partial", False)
        async with self._turn, contextlib.AsyncExitStack() as held:
            await held.enter_async_context(self._state.admission.drained())
            self._begin()
            self._update = await self._do(lambda: WeightUpdate(model, partial=partial, label="an update over HTTP"))
            self._held = held.pop_all()
            self._wait()
        return JSONResponse({"message": "Weight update started"})

    async def update(self, request: Request) -> Response:
        """Tensors as a safetensors file: the body, or shared memory that `{"shared_memory": NAME}` names."""
        if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            asked = await self._fields(request, {"update_info": dict, "shared_memory": str})
            asked = asked.get("update_info", asked)
            name = asked.get("shared_memory")
            if set(asked) != {"shared_memory"} or not isinstance(name, str) or not _SHARED_NAME.fullmatch(name):
                raise bad_request(
                    "send tensors as a safetensors file, or `shared_memory` with the name of a block of it"
                )
            await self._take(lambda update: _from_shared(update, name))
        else:
            async with self._bodies.body(request, MOST_BYTES) as body:
                await self._take(lambda update: update.load(PackedTensors(memoryview(body), "the body")))
        return JSONResponse({"message": "Weights updated"})

    async def finish(self, request: Request) -> Response:
        """End an update; the requests that wait are answered with the new weights."""
        await self._fields(request, FINISH_FIELDS)
        async with self._turn:
            update = self._started()
            report = await self._do(update.finish)
            await self._release("success")
        return JSONResponse({"message": "Weight update finished", **_told(report, self._began)})

    async def give_up(self, reason: str) -> None:
        """End an update that nobody goes on with."""
        async with self._turn:
            if self._update is not None:
                logger.warning("A weight update was given up: %s", reason)
                await self._release("cancelled")

    async def _take(self, load: Callable[[WeightUpdate], None]) -> None:
        async with self._turn:
            update = self._started()
            await self._do(lambda: load(update))
            self._wait()

    def _started(self) -> WeightUpdate:
        if self._update is None:
            raise ApiError(409, "no update has been started; POST /start_weight_update first", code="not_started")
        return self._update

    async def _do(self, work: Callable[[], T]) -> T:
        """What `work` returns, done in a thread; what it raises ends the exchange."""
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(working)
        except QuantloadError as error:
            await self._release("cancelled" if isinstance(error, LoadCancelledError) else "failure")
            logger.error("The weights were not exchanged: %s", error)
            raise ApiError(400, f"the weights were not exchanged: {error}", code="reload_failed") from error
        except BaseException:
            await asyncio.wait([working])  # who asked may have been cancelled, and the thread goes on to its end
            await self._release("failure")
            raise

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._state.is_reloading = True

    def _end(self, result: Any) -> None:
        """The weights are what they are: the server says so, and counts."""
        state, model = self._state, self._state.served().model
        state.is_reloading, state.incomplete = False, refusal(model)
        state.report = model.load_report.to_dict()
        seconds = time.monotonic() - self._began
        if self._metrics is not None:
            self._metrics.on_reload(result, seconds)
        logger.info("Reload: %s, in %.1f s", result, seconds)

    async def _release(self, result: Any) -> None:
        """Let the requests that wait go on."""
        if self._timer is not None:
            self._timer.cancel()
        update, self._update, self._timer = self._update, None, None
        if update is not None:
            await asyncio.to_thread(update.abort)  # which does nothing behind its end
        self._end(result)
        held, self._held = self._held, contextlib.AsyncExitStack()
        await held.aclose()

    def _wait(self) -> None:
        """Give up what has no next request in time."""
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(IDLE_SECONDS, self._give_up_alone)

    def _give_up_alone(self) -> None:
        giving_up = self.give_up(f"there was no request for {IDLE_SECONDS:g} s")
        self._giving_up = asyncio.get_running_loop().create_task(giving_up)  # the loop itself keeps no hold of it

    async def _fields(self, request: Request, kinds: Mapping[str, type]) -> dict[str, Any]:
        """The fields of a JSON object, which may be left out altogether; `ApiError` for others and other types."""
        async with self._bodies.body(request, SMALL_BYTES) as body:
            given = parse_json(body) if body else {}
        if not isinstance(given, dict):
            raise bad_request("the body is no JSON object")
        for name, value in given.items():
            if name not in kinds:
                raise bad_request(f"`{name}` is not known here; there are {', '.join(kinds)}", name)
            if not isinstance(value, kinds[name]):
                raise bad_request(f"`{name}` is {value!r}, no {kinds[name].__name__}", name)
        return given

    def _below(self, field: str, name: str) -> Path:
        """The folder of a name below the root, links followed; `ApiError` for what leads out of it."""
        assert self._root is not None
        refused = bad_request(f"`{field}` names no folder below the one that the server was given", field)
        try:
            folder = (self._root / name).resolve(strict=True)
            inside = folder.is_dir() and folder.is_relative_to(self._root) and folder != self._root
            if not inside or Path(name).is_absolute() or ".." in Path(name).parts:
                raise refused
            for path in folder.rglob("*"):
                if not path.resolve(strict=True).is_relative_to(self._root):
                    raise bad_request(
                        f"`{field}`: a link in that folder leads out of the one the server was given", field
                    )
        except (OSError, RuntimeError, ValueError) as error:
            raise refused from error
        return folder


def _reload(model: Any, wanted: Wanted, progress: Progress | bool) -> LoadReport:
    return reload_weights(
        model, wanted.folder, partial=wanted.partial, adapter=wanted.adapter, progress=progress
    )  # fmt: skip


def _reload_together(leader: Leader, model: Any, wanted: Wanted, progress: Progress | bool) -> LoadReport:
    return leader.together(wanted, lambda: _reload(model, wanted, progress))


def reload_as_told(model: Any, wanted: Wanted) -> None:
    """What another rank than the first does with its part, when that reloads its own."""
    _reload(model, wanted, False)


def _from_shared(update: WeightUpdate, name: str) -> None:
    """Load what lies in a block of shared memory; it stays its owner's."""
    try:
        block = shared_memory.SharedMemory(name)
    except (OSError, ValueError) as error:
        raise PolicyError(f"there is no shared memory {name!r} here") from error
    # It would be removed when this process ends, as if it were its own.
    resource_tracker.unregister(block._name, "shared_memory")  # type: ignore[attr-defined]
    try:
        assert block.buf is not None
        update.load(PackedTensors(block.buf, f"shared memory {name!r}"))
    finally:
        with contextlib.suppress(BufferError):  # an error on its way refers to tensors there
            block.close()


def _told(report: Any, began: float) -> dict[str, Any]:
    return {
        "state": report.state,
        "bytes_read": report.bytes_read,
        "seconds": round(time.monotonic() - began, 3),
    }
