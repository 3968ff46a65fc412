"""The server from beginning to end: take the port, load in the background, answer, stop cleanly."""

from __future__ import annotations

import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from .admission import MAX_QUEUE
from .app import create_app
from .binding import bind_socket, is_loopback, url_of
from .connections import LimitedConfig, LimitedServer
from .embeddings import Pooling
from .load_progress import WEIGHTS, LoadProgress
from .request_log import RequestLogMode
from .serving_metrics import MetricsSource
from .state import ServerState
from .transformers_serving import ServedModel
from .warm_up import warm_up
from .weights import WeightRoutes

logger = logging.getLogger("quantload")

Load = Callable[[LoadProgress, threading.Event], Any]

LOAD_STOP_SECONDS = 10.0
CANCEL_SECONDS = 5.0  # between telling generations to end and cutting their connections


def serve(
    load: Load,
    load_processor: Callable[[], Any],
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    continuous_batching: bool | None = False,
    max_queue: int = MAX_QUEUE,
    pooling: Pooling = "mean",
    log_level: str | None = "warning",
    request_log: RequestLogMode = "all",
    metrics: MetricsSource | None = None,
    shutdown_grace: float = 10.0,
    exit_on_load_error: bool = True,
    weights: WeightRoutes | None = None,
    quantization: str = "auto",
    device: str = "auto",
) -> None:
    """Serve one model until SIGTERM or SIGINT, then return.

    With `continuous_batching` requests are generated for together; None: where the model and its device allow it.
    `load(progress, cancel)` returns the model: it calls `progress(bytes_done, bytes_total)`, or `progress.watch` with a
    `Moment`, and ends early, with any exception, once the event `cancel` is set. `load_processor()` returns the
    tokenizer or processor and runs first. `quantization` and `device` are what is asked for, to be shown.
    The port is taken before either: port 0 takes a free one, and the log names it. While the model loads, and until it
    has answered a few requests of the server's own (`warm_up`), `/health` answers 503 with the progress. On a loopback
    address, and with `allowed_hosts`, requests that name another host are refused, as `create_app` says. While one
    request is answered and `max_queue` wait, others are told to come back later. Requests under way at the end get
    `shutdown_grace` seconds.

    All log lines go through Python's loggers, which are the caller's to set up: `quantload`, `quantload.requests`
    with a line a request (`request_log` says for which), and uvicorn's from `log_level` on (None: as
    its loggers have it). The last line before the first request has the URL. `/metrics` shows `metrics` besides the
    server's own.

    Raises `BindError` if the port cannot be taken, and what `load` raised if it failed; with
    `exit_on_load_error=False` the server then stays up instead, `/health` answering 500 with the error, until it is
    told to stop. `pooling` is how a model that generates no text makes one vector of those of a text's tokens.
    `weights` are the routes that exchange the weights.
    """
    bound = bind_socket(host, port)
    url = url_of(bound)
    if api_key is None and not is_loopback(bound):
        logger.warning("%s can be reached from other machines and has no API key: anybody there can use it", url)
    state = ServerState(
        model_name, metrics=metrics, continuous_batching=continuous_batching, max_queue=max_queue, pooling=pooling,
        quantization=quantization, device=device,
    )  # fmt: skip
    config = LimitedConfig(
        create_app(
            state,
            api_key,
            request_log,
            [host, *allowed_hosts] if allowed_hosts or is_loopback(bound) else None,
            weights,
        ),
        log_level=log_level,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=round(shutdown_grace + CANCEL_SECONDS),
    )
    server = _Server(config, state, shutdown_grace)
    loading = threading.Thread(
        target=_load,
        args=(state, server, load, load_processor, exit_on_load_error, url),
        name="quantload-load",
        daemon=True,
    )
    with bound, _quiet_signals(server):
        logger.info("Listening on %s, loading %s", url, model_name)
        loading.start()
        server.run(sockets=[bound])
    logger.info("Stopped listening on %s", url)
    gc.unfreeze()
    server.deadline.cancel()
    state.cancel.set()
    loading.join(LOAD_STOP_SECONDS)
    if loading.is_alive():
        logger.warning("the load did not stop within %g s of being cancelled", LOAD_STOP_SECONDS)
    if state.error is not None:
        raise state.error


class _Server(LimitedServer):
    """uvicorn, telling the load of a signal at once, and the generations after the grace period."""

    def __init__(self, config: uvicorn.Config, state: ServerState, grace: float) -> None:
        super().__init__(config)
        self.state = state
        self.deadline = threading.Timer(grace, state.stop)
        self.deadline.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop: no new connections, and no more loading."""
        self.state.cancel.set()
        if not self.should_exit:
            self.deadline.start()
        super().handle_exit(sig, frame)


def _load(
    state: ServerState,
    server: _Server,
    load: Load,
    load_processor: Callable[[], Any],
    exit_on_error: bool,
    url: str,
) -> None:
    try:
        processor = load_processor()
        state.progress.begin(WEIGHTS)
        state.finish(load(state.progress, state.cancel), processor, _get_ready)
    except BaseException as error:  # whatever it is, the main thread must hear of it
        if state.cancel.is_set():
            logger.info("Loading %s was cancelled", state.model_name)
            return
        state.fail(error)
        logger.error("Loading %s failed: %s", state.model_name, error)
        if exit_on_error:
            server.should_exit = True
        return
    logger.info("Serving %s at %s", state.model_name, url)


def _get_ready(served: ServedModel, cancel: threading.Event) -> None:
    """Warm up; and let the collector not walk a model and its libraries again for what requests leave.

    That would take half a second each time, in which nobody is answered.
    """
    warm_up(served, cancel)
    gc.collect()
    gc.freeze()


@contextmanager
def _quiet_signals(server: _Server) -> Iterator[None]:
    """Own handlers around uvicorn's: it raises the signal again after it stopped, which would end the process with it.

    They also catch a signal that arrives before uvicorn listens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_sig: int, _frame: FrameType | None) -> None:
        server.state.cancel.set()
        server.should_exit = True

    before = {sig: signal.signal(sig, stop) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
