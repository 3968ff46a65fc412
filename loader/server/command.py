"""`quantload serve`: a streaming load behind the server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoProcessor

from ..checkpoint.resolve import resolve
from ..errors import LoadCancelledError
from ..load import load_quantized
from ..memory.metrics import LoadMetrics
from ..memory.report import render
from ..options import LoadOptions, QuantizationPolicy
from .serve import Progress, serve


def serve_model(
    model_id: str | Path,
    quantization: str,
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
) -> None:
    """Load `model_id` in the background and serve it until SIGTERM or SIGINT."""
    metrics = LoadMetrics()

    def load(progress: Progress, cancel: threading.Event) -> Any:
        def on_progress(done: int, total: int) -> None:
            if cancel.is_set():
                raise LoadCancelledError("the server was told to stop while the model was loading")
            metrics.on_progress(done, total)
            progress(done, total)

        try:
            model = load_quantized(
                model_id, quantization, device=device, policy=policy, options=options, revision=revision,
                trust_remote_code=trust_remote_code, progress=on_progress,
            )  # fmt: skip
        except BaseException:
            metrics.on_failure(cancelled=cancel.is_set())
            raise
        metrics.on_plan(model.load_plan)
        metrics.on_report(model.load_report)
        render(model.load_report, Console(stderr=True))
        return model

    serve(
        load,
        lambda: AutoProcessor.from_pretrained(resolve(model_id, revision).root, trust_remote_code=trust_remote_code),
        model_name=served_model_name,
        host=host,
        port=port,
        api_key=api_key,
        continuous_batching=continuous_batching,
        metrics=metrics,
    )
