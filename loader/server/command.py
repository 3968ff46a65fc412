"""`quantload serve`: a streaming load behind the server."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.folder import Checkpoint
from ..checkpoint.resolve import resolve
from ..dummy import Weights
from ..errors import LoadCancelledError, PolicyError, UnsupportedCheckpointError
from ..load import load_quantized
from ..memory.metrics import LayerMetrics, LoadMetrics
from ..model.skeleton import find_model
from ..model.text_kinds import encodes_text
from ..options import LoadOptions, QuantizationPolicy
from ..progress import Moment, Progress
from ..ranks.launch import launched
from ..ranks.lockstep import Leader, follow
from ..schemes.names import SchemeName
from ..shortage import named
from ..tokenizer import load_processor
from .admission import MAX_QUEUE
from .auth import chosen_key
from .embeddings import Pooling, stored_pooling
from .hosts import checked_hosts
from .load_progress import LoadProgress
from .processors import check_processor
from .request_log import RequestLogMode
from .serve import serve
from .served_kinds import why_not_served
from .weights import WeightRoutes, reload_as_told

logger = logging.getLogger("quantload")

SHUTDOWN_SECONDS = 5.0


def serve_model(
    model_id: str | Path | Checkpoint,
    quantization: SchemeName | str,
    *,
    device: str,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    revision: str | None,
    trust_remote_code: bool,
    host: str,
    port: int,
    api_key: str | None,
    served_model_name: str,
    continuous_batching: bool | None,
    max_queue: int = MAX_QUEUE,
    request_log: RequestLogMode = "all",
    layer_metrics: LayerMetrics = "auto",
    api_key_file: Path | None = None,
    allowed_hosts: Sequence[str] = (),
    reload_root: Path | None = None,
    weight_updates: bool = False,
    weights: Weights = "checkpoint",
    tp: Literal["auto"] | None = None,
    expert_parallel: bool = False,
) -> None:
    """Load `model_id` in the background and serve it until SIGTERM or SIGINT.

    Of several ranks the first answers, and the others compute with it until it stops.
    """
    api_key = chosen_key(api_key, api_key_file)
    checked_hosts(allowed_hosts)
    metrics = LoadMetrics(layer_metrics)
    routes = None
    if reload_root is not None or weight_updates:
        if api_key is None:
            raise PolicyError("--reload-root and --weight-updates are for servers with an API key; give --api-key-file")
        if continuous_batching:
            raise PolicyError(
                "--reload-root and --weight-updates do not go with --continuous-batching, whose cache of common "
                "prompts would be that of the old weights"
            )
        routes = WeightRoutes(reload_root, weight_updates, metrics)
    if tp is not None:
        _check_ranks(continuous_batching is True, weight_updates)
    if tp is not None or routes is not None:
        continuous_batching = False  # neither new weights nor other ranks can follow a batch
    checkpoint = resolve(model_id, revision)
    recipe = find_model(checkpoint, trust_remote_code)
    why = why_not_served(recipe.cls, recipe.config, continuous_batching is True)
    if why is not None:
        raise UnsupportedCheckpointError(f"{checkpoint.model_id!r}, a {recipe.cls.__name__}, {why}")
    checkpoint.note_small_files()  # the load that follows sees that the tokenizer is still of the same model
    check_processor(checkpoint, trust_remote_code)
    pooling: Pooling = "mean"
    if encodes_text(recipe.cls):
        pooling = _pooling(checkpoint)
        logger.info("Texts become the %s of their tokens' vectors, of length 1", pooling)

    def load_model(progress: Progress | None) -> Any:
        return load_quantized(
            checkpoint, quantization, device=device, policy=policy, options=options,
            trust_remote_code=trust_remote_code, progress=progress or False, weights=weights, tp=tp,
            expert_parallel=expert_parallel,
        )  # fmt: skip

    if launched().rank > 0:
        model = load_model(None)
        follow(model, functools.partial(reload_as_told, model))
        return
    leaders: list[Leader] = []

    def load(progress: LoadProgress, cancel: threading.Event) -> Any:
        try:
            model = load_model(_Told(progress, metrics, cancel))
            if tp is not None:
                leaders.append(Leader(model))
                if routes is not None:
                    routes.reload_together(leaders[0])
        except BaseException:
            metrics.on_failure(cancelled=cancel.is_set())
            raise
        metrics.on_plan(model.load_plan)
        metrics.on_report(model.load_report)
        return model

    def processor() -> Any:
        with named("the tokenizer or processor"):
            return load_processor(checkpoint, trust_remote_code)

    try:
        serve(
            load,
            processor,
            model_name=served_model_name,
            host=host,
            port=port,
            api_key=api_key,
            allowed_hosts=allowed_hosts,
            continuous_batching=continuous_batching,
            max_queue=max_queue,
            pooling=pooling,
            request_log=request_log,
            log_level=None,
            metrics=metrics,
            shutdown_grace=SHUTDOWN_SECONDS,
            weights=routes,
            quantization=str(quantization),
            device=device,
        )
    finally:
        for leader in leaders:
            leader.stop()


def _check_ranks(continuous_batching: bool, weight_updates: bool) -> None:
    """Raise `PolicyError` for what a model of several ranks cannot do."""
    here = launched()
    if continuous_batching or weight_updates:
        option = "--continuous-batching" if continuous_batching else "--weight-updates"
        raise PolicyError(f"{option} is for servers of one process; serve several ranks without, or use an engine")
    if here.local_ranks < here.ranks:
        raise PolicyError(
            f"{here.ranks} ranks run on several hosts, {here.local_ranks} of them here; quantload serves with those of "
            f"one host: take an engine for more, such as `vllm serve MODEL --quantization quark_mxfp4 "
            f"--load-format quantload --tensor-parallel-size {here.ranks}`"
        )


class _Told:
    """Who is told how far the load is: those who ask the server, and its metrics. Cancels a load that is not wanted."""

    def __init__(self, progress: LoadProgress, metrics: LoadMetrics, cancel: threading.Event) -> None:
        self._progress, self._metrics, self._cancel = progress, metrics, cancel

    def watch(self, moment: Moment) -> None:
        if self._cancel.is_set():
            raise LoadCancelledError("the server was told to stop while the model was loading")
        self._progress.watch(moment)
        if moment.bytes_total > 0:  # the seconds and the speed that metrics show are those of reading
            self._metrics.on_progress(moment.bytes_read, moment.bytes_total)

    def __call__(self, done: int, total: int) -> None:
        self.watch(Moment("stream", 0.0, done, total))


def _pooling(checkpoint: Checkpoint) -> Pooling:
    try:
        return stored_pooling(checkpoint.root) or "mean"
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{checkpoint.model_id!r} cannot be served: {error}") from error
