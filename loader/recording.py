"""What a load writes down about itself while it runs, and the report it ends with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from .checkpoint.reader import ReadTotals
from .errors import CheckpointError, PolicyError, QuantloadError
from .memory import logs
from .memory.attempt import Attempt
from .memory.ledger import Ledger
from .memory.probes import probe_for
from .memory.report import CacheResult, KeptReport, LayerReport, LoadReport, NonFiniteReport
from .memory.versions import versions
from .model.attach import Process
from .model.leftovers import Leftovers, some
from .model.skeleton import Assignment
from .phases import Phases
from .plan import LoadPlan
from .progress import Moment, Progress, watcher_of
from .schemes.registry import PREQUANTIZED
from .spans import LoadSpans

logger = logging.getLogger("quantload")
SECONDS_A_LINE = 10.0
"""Between two lines of the log about a load under way."""
NOTHING_LEFT = Leftovers()


@dataclass(frozen=True)
class Expected:
    """What is known of a load before its first weight, whoever drives it; sizes in bytes.

    `bytes_total` is what will be read, `final_bytes` and `peak_bytes` are predicted.
    """

    bytes_total: int
    checkpoint_bytes: int
    final_bytes: int
    peak_bytes: int
    whole_conversions: int = 0
    leftovers: Leftovers = NOTHING_LEFT

    @classmethod
    def of(cls, plan: LoadPlan) -> Self:
        """What a plan says."""
        memory = plan.memory
        sizes = memory.checkpoint_bytes, memory.final_bytes, memory.peak_bytes
        return cls(plan.bytes_total, *sizes, plan.whole_conversions, plan.leftovers)


class Recorder:
    """Follows the memory of one load, collects its layers, writes its log lines and its report.

    `progress(bytes_read, bytes_total)` is called in the caller's thread about ten times a second. `doing` is what the
    load is called in traces: `load`, `reload` or `convert`.
    """

    def __init__(self, device: torch.device, stats: bool, progress: Progress | None, doing: str = "load") -> None:
        self._device = device
        self._stats = stats
        self._progress = progress
        self._watcher = watcher_of(progress)
        self._layers: dict[str, LayerReport] = {}
        self._lock = threading.Lock()
        self._expected: Expected | None = None
        self._bytes_in: Callable[[str], int] = lambda _: 0
        self._assignments: Mapping[str, Assignment] = {}
        self._untied: list[str] = []
        self._allowed: tuple[int | None, int | None] = None, None
        self._predicted_peak = 0
        self._phases = Phases()
        self._doing, self._spans = doing, LoadSpans(doing)
        self._shown = bool(getattr(progress, "shown", False))
        self._next_line = SECONDS_A_LINE
        _check_usable(device)
        self.ledger = Ledger(probe_for(device))

    def __enter__(self) -> Self:
        logs.log_before(self.ledger.probe.kind, self.ledger.baseline_bytes)
        self.ledger.start()
        try:
            self.begin("resolve")
        except BaseException as error:  # who watches may cancel a load before it has begun
            self.ledger.stop()
            self._spans.end(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.stop()
        self._phases.end()
        self._spans.say(
            device=str(self._device), bytes_read=self.ledger.bytes_read, peak_bytes=self.ledger.peak_bytes,
            predicted_peak_bytes=self._predicted_peak,
        )  # fmt: skip
        self._spans.end(error)
        if error is not None:
            if isinstance(error, QuantloadError):
                error.attempt = Attempt(
                    self.moment(), self.ledger.peak_bytes, self.ledger.timeline, self._phases.reports()
                )
            self._let_go()

    def begin(self, phase: str) -> None:
        """Another part of the load begins, one of `PhaseReport`."""
        self._phases.begin(phase)
        self._spans.begin(phase)
        self.ledger.record(self.ledger.bytes_read)
        if self._watcher is not None:
            self._watcher.watch(self.moment())

    def name(self, model: str, quantization: str) -> None:
        """What is loaded, as traces call it."""
        self._spans.say(model=model, quantization=quantization)

    def allow(self, predicted_peak: int, limit_bytes: int | None, available_bytes: int | None = None) -> None:
        """What the load was predicted to take, what the caller allows it, and what the machine has for it."""
        self._predicted_peak, self._allowed = predicted_peak, (limit_bytes, available_bytes)

    def moment(self) -> Moment:
        """How far the load is."""
        expected, ledger, peak = self._expected, self.ledger, self._predicted_peak
        total = 0 if expected is None else expected.bytes_total
        return Moment(
            self._phases.name, ledger.seconds, ledger.bytes_read, total, ledger.increase_bytes, peak, *self._allowed
        )

    def expect(self, plan: LoadPlan, assignments: list[Assignment]) -> None:
        """What is going to be loaded."""
        named = {assignment.name: assignment for assignment in assignments}
        self.expect_layers(Expected.of(plan), named, plan.bytes_in.__getitem__)

    def expect_layers(
        self, expected: Expected, assignments: Mapping[str, Assignment], bytes_in: Callable[[str], int]
    ) -> None:
        """What is going to be loaded where there is no plan; `bytes_in` is asked for a layer when it is complete."""
        self._expected, self._assignments, self._bytes_in = expected, assignments, bytes_in
        self._predicted_peak = expected.peak_bytes
        self.begin("stream")

    def on_bytes(self, bytes_read: int) -> None:
        """So many bytes have been read."""
        self.ledger.record(bytes_read)
        if self._watcher is not None:
            self._watcher.watch(self.moment())
        elif self._progress is not None and self._expected is not None:
            self._progress(bytes_read, self._expected.bytes_total)
        if not self._shown and self.ledger.seconds >= self._next_line:
            self._next_line = self.ledger.seconds + SECONDS_A_LINE
            logs.log_progress(self.moment())

    def on_layer(self, name: str, statistics: Tensor | None, process: Process = lambda: None) -> None:
        """A layer is complete, up to what `process` does; called once a layer from any thread.

        `statistics` are None where codes were copied as they are stored. After the load, when a layer is reloaded, it
        is not recorded.
        """
        process()
        assignment = self._assignments.get(name)
        if assignment is None:
            return
        assert assignment.scheme is not None
        layouts = assignment.scheme.layouts(assignment.module).values()
        known: dict[str, Any] = {
            "name": assignment.name,
            "kind": assignment.kind,
            "scheme": assignment.scheme.name,
            "kernel": assignment.scheme.kernel_names,
            "bytes_in": self._bytes_in(assignment.name),
            "bytes_out": sum(layout.nbytes for layout in layouts),
            "numel": sum(layout.numel for layout in layouts),
            "format": assignment.scheme.kernels.format.name,
            "rows": sum((layout.experts or 1) * layout.rows for layout in layouts),
        }
        if statistics is None or not self._stats:
            layer = LayerReport(**known)
        else:
            layer = LayerReport.from_statistics(statistics, **known)
        with self._lock:
            self._layers[assignment.name] = layer

    def on_untied(self, untied: Mapping[str, str], strict: bool) -> None:
        """Parameters that the model ties to others and that have values of their own: a warning, an error if strict."""
        self._untied = sorted(untied)
        if untied:
            pairs = some(f"{name} to {other}" for name, other in untied.items())
            said = (
                f"the model ties {pairs}, and the checkpoint has both with different values: is `tie_word_embeddings` "
                f"in config.json the one of this checkpoint?"
            )
            if strict:
                raise CheckpointError(f"{said} Without --strict (strict=True) each keeps its own, as in transformers")
            logger.warning("%s Each keeps its own, as in transformers", said)

    def report(
        self,
        name: str,
        quantization: str,
        totals: ReadTotals,
        final_bytes: int,
        kept_bytes: Callable[[nn.Module], int],
        cache: CacheResult | None = None,
        non_finite: Iterable[NonFiniteReport] = (),
        ranks: tuple[int, int] | None = None,
    ) -> LoadReport:
        """The report of a finished load, also written to the log; the plan is let go.

        `kept_bytes` are the bytes of a module that was left as stored, `non_finite` what was found in weights, `ranks`
        the own rank and how many there are.
        """
        expected, assignments = self._expected, self._assignments.values()
        assert expected is not None
        rank, world_size = ranks or (None, None)
        report = LoadReport(
            model=name,
            quantization=quantization,
            device=str(self._device),
            seconds=self.ledger.seconds,
            bytes_read=totals.bytes_read,
            checkpoint_bytes=expected.checkpoint_bytes,
            bytes_between=totals.bytes_between,
            final_bytes=final_bytes,
            peak_bytes=self.ledger.peak_bytes,
            staging_peak_bytes=totals.staging_peak_bytes,
            baseline_bytes=self.ledger.baseline_bytes,
            predicted_final_bytes=expected.final_bytes,
            predicted_peak_bytes=expected.peak_bytes,
            fallback_conversions=expected.whole_conversions,
            layers=[self._layers[a.name] for a in assignments if a.name in self._layers],
            kept=[KeptReport(a.name, a.reason, kept_bytes(a.module)) for a in assignments if a.scheme is None],
            timeline=self.ledger.timeline,
            cache=cache,
            unexpected=[*expected.leftovers.unexpected],
            unexpected_bytes=expected.leftovers.unexpected_bytes,
            ignored_tensors=len(expected.leftovers.ignored),
            initialized=[*expected.leftovers.initialized],
            overlaid=[*expected.leftovers.overlaid],
            untied=self._untied,
            non_finite=[*non_finite],
            rank=rank,
            world_size=world_size,
            limit_bytes=self._allowed[0],
            available_bytes=self._allowed[1],
            phases=self._phases.reports(),
            versions=dict(versions()),
        )
        self._log(report)
        self._let_go()
        return report

    def _let_go(self) -> None:
        """Forget the model: its closures call `on_layer`, and a cycle would keep both until the collector ran."""
        self._expected, self._assignments = None, {}
        self._bytes_in = lambda _: 0

    def _log(self, report: LoadReport) -> None:
        if self._doing != "convert":
            logs.log_increase(self.ledger.increase_bytes)
        by_scheme: dict[str, list[str]] = {}
        kept: dict[str, list[str]] = {}
        for layer in report.layers:
            if layer.scheme == PREQUANTIZED:
                kept.setdefault(str(layer.format), []).append(layer.name)
            else:
                by_scheme.setdefault(layer.scheme, []).append(layer.name)
        for scheme, names in by_scheme.items():
            logs.log_quantized(scheme, len(names), logs.layer_types(names))
        for fmt, names in kept.items():
            logs.log_prequantized(fmt, len(names), logs.layer_types(names))
        logs.log_non_finite(report.non_finite)
        kind = self.ledger.probe.kind
        if self._doing == "convert":
            logs.log_converted(kind, report.peak_bytes, report.bytes_read, report.final_bytes, report.seconds)
            return
        logs.log_peak(kind, report.peak_bytes, report.final_bytes, report.staging_peak_bytes)
        logs.log_loaded(report.bytes_read, report.seconds)


def _check_usable(device: torch.device) -> None:
    """Raise `PolicyError` for a device that torch knows and nothing can be loaded onto here."""
    if device.type not in ("cpu", "cuda"):
        raise PolicyError(f"device is {str(device)!r}; quantload loads onto cpu and cuda (CUDA or ROCm)")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise PolicyError(
            f"device is {str(device)!r}; torch {torch.__version__} sees {count} CUDA or ROCm devices here: "
            f"choose one of those, or cpu"
        )


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
        if not tensor.is_meta
    }
    return sum(storages.values())
