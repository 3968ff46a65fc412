"""What the server knows about its model: loading, ready or failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from .admission import MAX_QUEUE, Admission
from .api_errors import ApiError
from .embeddings import Pooling
from .load_progress import WARM_UP, LoadProgress
from .serving_metrics import MetricsSource, ServingMetrics
from .transformers_serving import ServedModel

Status = Literal["loading", "ready", "failed"]
WarmUp = Callable[[ServedModel, threading.Event], None]


class ServerState:
    """Shared by the thread that loads and the event loop that answers.

    `model_name` is the only name requests may give. `metrics` is what `/metrics` shows besides the server's own.
    `cancel` is set when the server is told to stop: the load watches it. `progress` is how far the load
    is; `quantization` and `device` are those that were asked for. `created` is in Unix seconds.
    """

    def __init__(
        self,
        model_name: str,
        *,
        metrics: MetricsSource | None = None,
        continuous_batching: bool | None = False,
        max_queue: int = MAX_QUEUE,
        pooling: Pooling = "mean",
        quantization: str = "auto",
        device: str = "auto",
    ) -> None:
        self.model_name = model_name
        self.metrics = ServingMetrics(model_name, metrics)
        self.continuous_batching = continuous_batching
        self.pooling = pooling
        self.admission = Admission(max_queue)
        self.cancel = threading.Event()
        self.created = int(time.time())
        self.error: BaseException | None = None
        self.report: dict[str, Any] | None = None
        self.quantization, self.device = quantization, device
        self.progress = LoadProgress()
        self._served: ServedModel | None = None
        self.is_reloading = False
        self.incomplete: str | None = None
        """Why the weights are not all of one checkpoint, while they are not."""

    @property
    def status(self) -> Status:
        """`loading` until `finish` or `fail` was called."""
        if self._served is not None:
            return "ready"
        return "loading" if self.error is None else "failed"

    def finish(self, model: Any, processor: Any, warm_up: WarmUp | None = None) -> None:
        """Begin to serve `model`, with its tokenizer or processor; its `load_report` becomes `/load_report`.

        It is not ready before `warm_up(served, cancel)` has returned.
        """
        report = getattr(model, "load_report", None)
        self.report = report.to_dict() if report is not None else {}
        served = ServedModel(model, processor, self.model_name, self.continuous_batching, self.pooling)
        if warm_up is not None:
            self.progress.begin(WARM_UP)
            warm_up(served, self.cancel)
        self.progress.begin("")
        self._served = served

    def fail(self, error: BaseException) -> None:
        """Remember why there will be no model."""
        self.progress.begin("")
        self.error = error

    def served(self) -> ServedModel:
        """The model, or an `ApiError`: 503 with `Retry-After` while it loads, 500 when the load failed."""
        if self._served is not None:
            return self._served
        if self.error is not None:
            raise ApiError(500, f"the model could not be loaded: {self.error}", code="model_load_failed")
        read = f"{self.progress.fraction():.0%} read"
        raise ApiError(
            503,
            f"the model is still loading ({self.progress.phase}, {read}); try again later, /health tells how far it is",
            code="model_loading",
            headers=self.retry_after(),
        )

    def served_admission(self) -> Admission:
        """Who lets requests in; an `ApiError` (503) where the weights cannot be used."""
        if self.incomplete is not None:
            raise ApiError(503, f"the weights are incomplete: {self.incomplete}", code="weights_incomplete")
        return self.admission

    def retry_after(self) -> dict[str, str]:
        """A `Retry-After` header: the seconds left at the pace so far, between 1 and 60."""
        done = self.progress.fraction()
        left = self.progress.seconds * (1 - done) / done if done > 0 else 5.0
        return {"Retry-After": str(max(1, min(60, round(left))))}

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status code and JSON of `/health`: 200 ready, 503 loading, dead worker or incomplete weights, 500 failed."""
        if self._served is not None:
            dead = self._served.worker_error()
            if dead is not None:
                return 503, {"status": "unhealthy", "model": self.model_name, "error": dead}
            if self.incomplete is not None:
                return 503, {"status": "unhealthy", "model": self.model_name, "error": self.incomplete}
            return 200, {"status": "reloading" if self.is_reloading else "ok", "model": self.model_name}
        if self.error is not None:
            error = {"type": type(self.error).__name__, "message": str(self.error)}
            return 500, {"status": "failed", "model": self.model_name, "error": error}
        return 503, {
            "status": "loading",
            "phase": self.progress.phase,
            "model": self.model_name,
            "progress": round(self.progress.fraction(), 4),
            "bytes_done": self.progress.bytes_done,
            "bytes_total": self.progress.bytes_total,
            "seconds": round(self.progress.seconds, 3),
        }

    def stop(self) -> None:
        """End the load or every generation under way; blocks for a few seconds at most."""
        self.cancel.set()
        if self._served is not None:
            self._served.stop()
