"""What a conversion would write, file by file, and with which schemes that stays below a size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.folder import Checkpoint
from ..checkpoint.working_memory import CPU
from ..checkpoint.writer import ShardPlan, plan_shards
from ..collector import collector_paused
from ..draft import Draft, draft_load
from ..errors import PolicyError
from ..fit.expected_loss import ERRORS, NOTHING, ladder
from ..fit.policy import Fitted, Planned, candidate, check_choosable, choose, tell
from ..fit.room import Room
from ..online.storage import FinalStorage
from ..options import LoadOptions, QuantizationPolicy
from ..plan import plan_without_pieces
from ..schemes.exported.registry import formats_of
from ..schemes.exported.weights import ExportFormat
from ..schemes.registry import AS_STORED, ENTRIES
from .shards import PlannedTensor
from .tensors import QuantizedTensor, plan_tensors
from .together import units

logger = logging.getLogger("quantload")


@dataclass(frozen=True)
class PlannedFiles:
    """A draft, what becomes of every tensor of the checkpoint, and the files of weights that are written."""

    draft: Draft
    tensors: Sequence[PlannedTensor]
    shards: Sequence[ShardPlan]

    @property
    def nbytes(self) -> int:
        """Bytes of all of these files."""
        return sum(shard.size for shard in self.shards)

    def module_bytes(self) -> dict[str, int]:
        """Bytes of the weights of each module that is quantized, as they are written."""
        found: dict[str, int] = {}
        for tensor in self._quantized():
            name = tensor.assignment.name
            found[name] = found.get(name, 0) + sum(spec.nbytes for spec in tensor.specs())
        return found

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the same weights as they are stored."""
        found: dict[str, int] = {}
        for tensor in self._quantized():
            found[tensor.assignment.name] = found.get(tensor.assignment.name, 0) + tensor.entry.nbytes
        return found

    def _quantized(self) -> Iterator[QuantizedTensor]:
        return (tensor for tensor in self.tensors if isinstance(tensor, QuantizedTensor))


@dataclass(frozen=True)
class FilePlanner:
    """Plans conversions of one checkpoint to one format, with one policy or another."""

    checkpoint: Checkpoint
    export: ExportFormat
    options: LoadOptions
    max_shard_bytes: int
    trust_remote_code: bool

    def plan(self, quantization: str, policy: QuantizationPolicy | None) -> PlannedFiles:
        """Everything before the first weight. Raises `PolicyError` for what the format cannot hold."""
        with collector_paused():
            draft = draft_load(
                *(self.checkpoint, quantization, policy, self.options, FinalStorage(CPU), lambda *_: None),
                trust_remote_code=self.trust_remote_code,
                plan=plan_without_pieces,
            )
            tensors = plan_tensors(draft.sources.entries, draft.routes, draft.loaders, draft.assignments, self.export)
            specs = ([spec for tensor in unit for spec in tensor.specs()] for unit in units(tensors))
            return PlannedFiles(draft, tensors, plan_shards(specs, self.max_shard_bytes))

    def fit(
        self,
        quantization: str,
        policy: QuantizationPolicy | None,
        size: int | str,
        measured: Mapping[str, float] = NOTHING,
    ) -> Fitted:
        """The policy of the least expected loss whose files of weights have at most `size` bytes; the log is told.

        `measured` are sensitivities as `items_of` takes them.
        Of schemes that the format holds. Raises `MemoryBudgetError` where not even the smallest of them fit.
        """
        check_choosable(quantization, policy, self.checkpoint.is_quantized)
        if isinstance(size, str):
            raise PolicyError(
                "fit is auto, what this machine has free, and a conversion needs next to nothing of it: say how large "
                "the files of weights may be"
            )

        def plan(chosen: QuantizationPolicy) -> Planned:
            with candidate():
                files = self.plan("auto", chosen)
            return Planned(files.draft, files.nbytes, files.nbytes)

        policy = policy or QuantizationPolicy()
        room = Room(size, "the checkpoint")
        totals, sizes = self._uniform(policy)
        found = choose(policy, ladder(totals, totals), plan, lambda _: room, measured, sizes)
        tell(found)
        return found

    def _uniform(self, policy: QuantizationPolicy) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Bytes of the files by scheme, and of each module in them, of those that this model can be written in."""
        totals: dict[str, int] = {}
        sizes: dict[str, dict[str, int]] = {}
        first: PolicyError | None = None
        for entry in ENTRIES:
            is_held = self.export.name in formats_of(entry) and entry.has_mode(policy.scale_mode)
            if entry.name not in ERRORS or not is_held:
                continue
            try:
                with candidate():
                    files = self.plan("auto", replace(policy, linear=entry.name, experts=None))
            except PolicyError as error:
                logger.info("Fit: without %s: %s", entry.name, error)
                first = first or error
                continue
            totals[entry.name] = files.nbytes
            sizes[entry.name] = files.module_bytes()
            sizes.setdefault(AS_STORED, {}).update(files.stored_bytes())
        if not totals:
            raise first or PolicyError(
                f"fit chooses among schemes, and {self.export.name} holds none for linear layers and experts alike: "
                f"name one (-q)"
            )
        return totals, sizes
