"""One load writes an entry: its layers as they become complete, then what was kept as stored, then what they mean."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weight_map import INDEX_NAME
from ..checkpoint.writer import plan_shards, weight_index
from ..plan import loaded_parameters
from .checksums import SEGMENT_BYTES
from .description import entry_config
from .restored import final_tensors
from .store import Store
from .writer import TensorWriter

if TYPE_CHECKING:
    from ..draft import Draft

CONFIG, STATISTICS = "config.json", "statistics.json"
MAX_SHARD_BYTES = 4 << 30


class EntryRecording:
    """The entry `key` of a store on its way; use it as a context, and nothing is left of it without `finish`.

    Raises `OSError` where there is no room for it, and `BlockingIOError` while another process writes it.
    """

    def __init__(self, store: Store, key: str, checkpoint: Checkpoint, draft: Draft, with_statistics: bool) -> None:
        self._loaders = draft.loaders
        self._parameters = loaded_parameters(draft.mapped, draft.loaders)
        self._assignments = {assignment.name: assignment for assignment in draft.assignments}
        self._statistics: dict[str, list[float]] | None = {} if with_statistics else None
        specs = final_tensors(draft.loaders, self._parameters)
        self._plans = plan_shards(([spec] for spec in specs), MAX_SHARD_BYTES)
        self._small = {CONFIG: json.dumps(entry_config(checkpoint, draft.assignments, draft.untied), indent=2).encode()}
        if len(self._plans) > 1:
            self._small[INDEX_NAME] = json.dumps(weight_index(self._plans)).encode()
        with contextlib.ExitStack() as stack:
            self._unfinished = store.reserve(key, self._expected_bytes())
            stack.callback(self._unfinished.discard)
            self._writer = stack.enter_context(TensorWriter(self._unfinished.folder, self._plans))
            self._open = stack.pop_all()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors and their headers."""
        return sum(plan.size for plan in self._plans)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def take(self, name: str, statistics: Tensor | None, then: Callable[[], None]) -> None:
        """A module is complete: write it as it is now, and call `then` when it may be changed."""
        assignment = self._assignments[name]
        assert assignment.scheme is not None
        scheme, module = assignment.scheme, assignment.module
        tensors: dict[str, Tensor] = {}
        for key, layout in scheme.layouts(module).items():
            tensors |= zip(layout.format.names(f"{name}.{key}"), scheme.weight(module, layout, key), strict=True)
        if self._statistics is not None and statistics is not None:
            self._statistics[name] = statistics.tolist()
        self._writer.take(tensors, then)

    def wait(self) -> None:
        """All parameters are complete: write what was kept as stored, and wait until every `then` was called.

        Raises what one of them raised: that is an error of the load, whatever becomes of the entry.
        """
        for name in self._parameters:
            loader = self._loaders.restorable[name]
            if loader.values_dtype is not None:
                self._writer.take(dict(zip(self._loaders.stored_names(name), loader.tensors(), strict=True)), _nothing)
        self._writer.wait()

    def finish(self) -> None:
        """Wait for the disk, and publish the entry; comes after `wait`."""
        checksums = self._writer.finish()
        small = self._small | {STATISTICS: json.dumps(self._statistics, sort_keys=True).encode()}
        self._unfinished.publish(small, checksums)

    def _expected_bytes(self) -> int:
        """Of all files: each segment has four bytes of checksum, each module a line of statistics."""
        small = sum(len(data) for data in self._small.values())
        return self.nbytes + self.nbytes // SEGMENT_BYTES * 4 + small + 512 * len(self._assignments) + 4096


def _nothing() -> None: ...
