"""A load that an engine drives: the tensors it is handed, and what it says in the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import nn

from ..checkpoint.folder import CONFIG_NAME, Checkpoint
from ..checkpoint.index import CheckpointIndex, read_index
from ..checkpoint.reader import ReadTotals
from ..checkpoint.resolve import resolve
from ..checkpoint.small_tensors import SmallTensors
from ..memory.amounts import format_bytes
from ..memory.planner import SLACK_BYTES
from ..memory.report import LoadReport, NonFiniteReport
from ..model.skeleton import Assignment
from ..options import LoadOptions
from ..recording import Expected, Recorder, tensor_bytes
from ..schemes.registry import SchemeFactory
from ..schemes.stored.read import read_stored
from ..schemes.stored.weights import StoredCheckpoint, StoredWeight
from .closures import EngineLayer, engine_layers
from .engine_metrics import publish
from .lazy import LazyTensor
from .origin import CheckpointOrigin, Materialized

REPORT = "QUANTLOAD_REPORT"
"""The environment variable that says where the report goes as JSON: the name of a file, in which `{rank}` is the rank;
where there are several ranks and it has none, each writes to that name with `.rank0` and so on behind it."""


Kept = tuple[Literal["linear", "experts"], str]


class EngineLoad:
    """One load of a model that an engine has built; a context manager around it.

    `kept` are the layers that stay as stored, by name: their kind, and the reason.
    """

    def __init__(self, model: nn.Module, options: LoadOptions, device: torch.device, kept: Mapping[str, Kept]) -> None:
        self._model, self._options, self._device = model, options, device
        self._recorder = Recorder(device, options.stats, None)
        self._layers: dict[str, EngineLayer] = {}
        self._assignments: dict[str, Assignment] = {}
        for module, layer in engine_layers(model):
            layer.on_finished = self._recorder.on_layer
            self._layers[layer.name] = layer
            self._assignments[layer.name] = Assignment(layer.name, layer.kind, module, layer.scheme, "")
        modules = dict(model.named_modules())
        for name, (kind, reason) in kept.items():
            if name in modules and name not in self._assignments:
                self._assignments[name] = Assignment(name, kind, modules[name], None, reason)
        self._final_bytes, self._checkpoint_bytes = tensor_bytes(model), 0
        self._origins: list[CheckpointOrigin] = []
        self._open = ExitStack()
        self.names: set[str] = set()
        """The tensors that were handed over, by the checkpoint's names."""

    def __enter__(self) -> Self:
        self._recorder.__enter__()
        self._expect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        self._recorder.__exit__(kind, error, trace)

    def tensors(self, folder: str, files: Iterable[str]) -> Iterator[tuple[str, LazyTensor]]:
        """Names and tensors of those `files` of a checkpoint, in the order of its files; none of them is read yet.

        Those of a quantized one are what its codes stand for. Raises `UnsupportedCheckpointError` for one that is not
        read here.
        """
        checkpoint = resolve(folder)
        index = read_index(checkpoint)
        wanted = {Path(file).name for file in files}
        self._checkpoint_bytes += sum(entry.nbytes for entry in index.tensors.values())
        self._expect()
        source = checkpoint.files.source(self._options)
        self._open.callback(source.close)
        factory = SchemeFactory(self._device, self._options)
        origin = CheckpointOrigin(
            index,
            source,
            self._options,
            self._device,
            on_bytes=self._recorder.on_bytes,
            stored=_stored(checkpoint, index, factory),
            dequantizer=factory.dequantizer,
        )
        self._origins.append(self._open.enter_context(origin))
        is_wanted = {shard.path: Path(shard.path).name in wanted for shard in index.shards}
        for name, tensor in origin.tensors():
            if is_wanted[origin.file_of(name)]:
                self.names.add(name)
                yield name, tensor

    def flush(self) -> None:
        """Read what was asked for and is not there yet; threads of an engine may ask after the last tensor."""
        for origin in self._origins:
            origin.flush()

    def report(self, name: str, quantization: str) -> LoadReport:
        """What the load has done; `name` is that of the model."""
        totals = [origin.totals.read for origin in self._origins]
        read = ReadTotals(
            sum(each.bytes_read for each in totals),
            sum(each.seconds for each in totals),
            max((each.staging_peak_bytes for each in totals), default=0),
        )
        found = [each for origin in self._origins for each in origin.non_finite.found()]
        self._expect()  # what was read whole counts as a conversion that no region can tell
        return self._recorder.report(
            *(name, quantization, read, tensor_bytes(self._model), tensor_bytes),
            non_finite=[
                NonFiniteReport(each.name, each.nan, each.infinite, each.overflowed, each.index) for each in found
            ],
            ranks=_ranks(),
        )

    @property
    def materialized(self) -> list[Materialized]:
        """Tensors that were read whole."""
        return [each for origin in self._origins for each in origin.totals.materialized]

    @property
    def as_values(self) -> list[str]:
        """Weights that are stored quantized, and went to tensors that hold values."""
        return sorted({name for origin in self._origins for name in origin.totals.as_values})

    def _expect(self) -> None:
        final = self._final_bytes
        read_whole = len(self.materialized)
        expected = Expected(self._checkpoint_bytes, self._checkpoint_bytes, final, final + SLACK_BYTES, read_whole)
        self._recorder.expect_layers(expected, self._assignments, lambda name: self._layers[name].bytes_in)


def stored_weights(folder: str) -> Mapping[str, StoredWeight] | None:
    """What the checkpoint in a folder stores quantized, by name; `None` where it is not quantized."""
    checkpoint = resolve(folder)
    if not _is_quantized(checkpoint):
        return None
    return _read(checkpoint, read_index(checkpoint)).weights


def _is_quantized(checkpoint: Checkpoint) -> bool:
    return (checkpoint.root / CONFIG_NAME).exists() and checkpoint.is_quantized


def _read(checkpoint: Checkpoint, index: CheckpointIndex) -> StoredCheckpoint:
    with SmallTensors(checkpoint, index) as read:
        return read_stored(checkpoint.config(), index.tensors, read)


def _stored(checkpoint: Checkpoint, index: CheckpointIndex, factory: SchemeFactory) -> StoredCheckpoint | None:
    """What a checkpoint stores quantized, whose kernels are ready then; `None` where it is not quantized."""
    if not _is_quantized(checkpoint):
        return None
    stored = _read(checkpoint, index)
    with factory.compiling(torch.float32):
        for name in {weight.format.name for weight in stored.weights.values()}:
            factory.dequantizer(name)
    return stored


def tell(report: LoadReport, materialized: int, logger: logging.Logger) -> None:
    """One line in the engine's log, gauges, and the report as JSON where `QUANTLOAD_REPORT` asks for it."""
    publish(report)
    where = "" if report.rank is None else f"rank {report.rank} of {report.world_size}, "
    logger.info(
        "quantload: %s%s, quantized_layers=%d, kept_layers=%d, read %s of %s in %.1f s, model %s, peak %s, %d tensors "
        "read whole",
        where,
        report.quantization,
        len(report.layers),
        len(report.kept),
        format_bytes(report.bytes_read),
        format_bytes(report.checkpoint_bytes),
        report.seconds,
        format_bytes(report.final_bytes),
        format_bytes(report.peak_bytes),
        materialized,
    )
    path = os.environ.get(REPORT)
    if path:
        rank = report.rank or 0
        named = path.replace("{rank}", str(rank))
        report.save(named if report.rank is None or "{rank}" in path else f"{named}.rank{rank}")


def _ranks() -> tuple[int, int] | None:
    """The own rank and the number of ranks, where there are several."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
