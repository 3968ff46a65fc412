"""`quantload serve`: a streaming load behind the server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.resolve import Checkpoint, resolve
from ..dummy import Weights
from ..errors import LoadCancelledError, PolicyError, UnsupportedCheckpointError
from ..load import load_quantized
from ..memory.metrics import LayerMetrics, LoadMetrics
from ..model.skeleton import find_model
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.names import SchemeName
from ..shortage import named
from .admission import MAX_QUEUE
from .auth import chosen_key
from .embeddings import Pooling, stored_pooling
from .hosts import checked_hosts
from .processors import check_processor, load_processor
from .request_log import RequestLogMode
from .serve import Progress, serve
from .served_kinds import encodes_text, why_not_served
from .weights import WeightRoutes

logger = logging.getLogger("quantload")

SHUTDOWN_SECONDS = 5.0


def serve_model(
    model_id: str | Path,
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
    continuous_batching: bool,
    max_queue: int = MAX_QUEUE,
    request_log: RequestLogMode = "all",
    layer_metrics: LayerMetrics = "auto",
    api_key_file: Path | None = None,
    allowed_hosts: Sequence[str] = (),
    reload_root: Path | None = None,
    weight_updates: bool = False,
    weights: Weights = "checkpoint",
) -> None:
    """Load `model_id` in the background and serve it until SIGTERM or SIGINT."""
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
    checkpoint = resolve(model_id, revision)
    recipe = find_model(checkpoint, trust_remote_code)
    why = why_not_served(recipe.cls, recipe.config, continuous_batching)
    if why is not None:
        raise UnsupportedCheckpointError(f"{checkpoint.model_id!r}, a {recipe.cls.__name__}, {why}")
    checkpoint.note_small_files()  # the load that follows sees that the tokenizer is still of the same model
    check_processor(checkpoint, trust_remote_code)
    pooling: Pooling = "mean"
    if encodes_text(recipe.cls):
        pooling = _pooling(checkpoint)
        logger.info("Texts become the %s of their tokens' vectors, of length 1", pooling)

    def load(progress: Progress, cancel: threading.Event) -> Any:
        def on_progress(done: int, total: int) -> None:
            if cancel.is_set():
                raise LoadCancelledError("the server was told to stop while the model was loading")
            metrics.on_progress(done, total)
            progress(done, total)

        try:
            model = load_quantized(
                checkpoint, quantization, device=device, policy=policy, options=options,
                trust_remote_code=trust_remote_code, progress=on_progress, weights=weights,
            )  # fmt: skip
        except BaseException:
            metrics.on_failure(cancelled=cancel.is_set())
            raise
        metrics.on_plan(model.load_plan)
        metrics.on_report(model.load_report)
        return model

    def processor() -> Any:
        with named("the tokenizer or processor"):
            return load_processor(checkpoint, trust_remote_code)

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
    )


def _pooling(checkpoint: Checkpoint) -> Pooling:
    try:
        return stored_pooling(checkpoint.root) or "mean"
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{checkpoint.model_id!r} cannot be served: {error}") from error
