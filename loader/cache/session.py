"""What a cache does in one load: bring the model back from an entry, or watch the load and write one.

The load stays what it is. The same skeleton, policy, schemes and closures are made from the checkpoint's headers either
way; an entry only replaces where the bytes come from, so that a load from it ends in the same model and report.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..checkpoint.folder import Checkpoint
from ..checkpoint.index import Shard, read_index
from ..checkpoint.source import Source
from ..errors import CheckpointError, DamagedEntryError, NonFiniteWeightError, PolicyError, RouteError
from ..memory.amounts import format_bytes
from ..memory.report import CacheResult
from ..model.attach import OnFinished, Process
from ..options import LoadOptions
from ..plan import LoadPlan, loaded_parameters
from ..ranks.alone import ALONE, Alone
from .entry import Entry
from .key import entry_key
from .recording import CONFIG, STATISTICS, EntryRecording
from .restored import plan_restored
from .store import Store

if TYPE_CHECKING:
    from ..draft import Draft

logger = logging.getLogger("quantload")

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """Where a load reads its weights: the files, and the plan with the pieces of them."""

    source: Source
    shards: tuple[Shard, ...]
    plan: LoadPlan


class NoCache:
    """Every load reads its checkpoint."""

    result: CacheResult | None = None

    def __init__(
        self, checkpoint: Checkpoint, options: LoadOptions, on_layer: OnFinished, ranks: Alone = ALONE
    ) -> None:
        self._checkpoint, self._options, self._finish_layer = checkpoint, options, on_layer
        self._ranks = ranks

    def on_layer(self, name: str, statistics: Tensor | None, process: Process) -> None:
        """A layer is complete."""
        self._finish_layer(name, statistics, process)

    def attempt(self, load: Callable[[], T]) -> T:
        """What `load` returns."""
        return load()

    @contextlib.contextmanager
    def reading(self, draft: Draft) -> Iterator[Reading]:
        """Where a load reads; inside, every parameter it has tensors for becomes complete.

        At its end the files of the checkpoint must be those that the draft was made of, or it is a `ChangedFileError`.
        """
        files, shards = self._checkpoint.files, draft.index.shards
        with self._ranks.reading(files.source, self._options, shards) as source:
            yield Reading(source, shards, draft.plan)
        files.check_unchanged()


class FolderCache(NoCache):
    """Loads use, or write, an entry below `folder`; the attributes of `NoCache` have the same meaning.

    While another process writes an entry, a load reads the checkpoint and writes nothing: waiting for the other could
    not end sooner. Whatever is wrong with the cache is a warning, and the load goes on without it.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        options: LoadOptions,
        on_layer: OnFinished,
        trust_remote_code: bool,
        ranks: Alone = ALONE,
    ) -> None:
        super().__init__(checkpoint, options, on_layer, ranks)
        self._folder, self._trust_remote_code = folder, trust_remote_code
        self._store = Store(folder, options.cache_bytes)
        self._damaged = False
        self._recording: EntryRecording | None = None

    def on_layer(self, name: str, statistics: Tensor | None, process: Process) -> None:
        """A layer is complete: it finishes as it would without a cache, after it was written."""
        finish = functools.partial(super().on_layer, name, statistics, process)
        if self._recording is None:
            finish()
        else:
            self._recording.take(name, statistics, finish)

    def attempt(self, load: Callable[[], T]) -> T:
        """What `load` returns; it is called again, and looks for no entry, where that proves to be damaged."""
        loaded: list[T] = []
        try:
            loaded.append(load())
        except DamagedEntryError as error:
            self._tell_damage(error)
        if not self._ranks.any("damaged", not loaded):
            return loaded[0]
        self._damaged = True
        loaded.clear()  # where it was the entry of another rank, before there are two models
        return load()

    @contextlib.contextmanager
    def reading(self, draft: Draft) -> Iterator[Reading]:
        """Where a load reads; meanwhile its entry is kept from being removed, or is written."""
        key = entry_key(
            self._checkpoint,
            draft.rules.policy,
            draft.assignments,
            self._trust_remote_code,
            self._options.cache_verify,
            *(() if self._ranks.part is None else (self._ranks.part,)),
        )
        entry = self._find_together(key)
        with contextlib.ExitStack() as stack:
            if entry is None:
                stack.enter_context(self._recorded(key, draft))
                yield stack.enter_context(super().reading(draft))
            else:
                stack.enter_context(entry)
                stack.enter_context(_damage())
                yield self._restored(draft, entry)
        self._checkpoint.files.check_unchanged()

    def _find_together(self, key: str) -> Entry | None:
        """The entry, if every rank has one of its part."""
        try:
            entry = self._find(key)
        except DamagedEntryError as error:
            if self._ranks.ranks == 1:
                raise
            self._tell_damage(error)  # and go on as without one: the others do
            self._damaged, entry = True, None
        if self._ranks.any("without an entry", entry is None) and entry is not None:
            entry.release()
            return None
        return entry

    def _tell_damage(self, error: DamagedEntryError) -> None:
        logger.warning("Cache: an entry of %s is damaged and will be written anew: %s", self._folder, error)

    def _find(self, key: str) -> Entry | None:
        """The entry, unless it lacks the statistics that the load wants."""
        if self._damaged:
            return None
        try:
            entry = self._store.find(key)
        except OSError as error:
            logger.warning("Cache: %s cannot be read: %s", self._folder, error.strerror or error)
            return None
        if entry is None:
            return None
        with contextlib.ExitStack() as stack:
            stack.enter_context(entry)
            stack.enter_context(_damage())
            if self._options.stats and _statistics(entry) is None:
                return None
            stack.pop_all()
        return entry

    def _restored(self, draft: Draft, entry: Entry) -> Reading:
        """The pieces of an entry in place of those of the checkpoint."""
        self.result = "hit"
        entry.read_json(CONFIG)
        source = entry.source(self._options)
        for name in entry.checksums:
            source.size(name)
        index = read_index(Checkpoint(entry.folder, self._checkpoint.model_id), source)
        parameters = loaded_parameters(draft.mapped, draft.loaders)
        pieces = plan_restored(
            index.tensors, draft.loaders, parameters, _statistics(entry) or {}, self._options.chunk_bytes
        )
        logger.info("Cache: reading %s from %s", format_bytes(index.total_bytes), entry.folder)
        plan = replace(draft.plan, pieces=pieces, bytes_total=sum(piece.nbytes for piece in pieces))
        return Reading(source, index.shards, plan)

    @contextlib.contextmanager
    def _recorded(self, key: str, draft: Draft) -> Iterator[None]:
        """Meanwhile the layers that become complete are written; in the end all of them are an entry."""
        self.result = "unwritten"
        with contextlib.ExitStack() as stack:
            recording = self._begin(key, draft)
            if recording is not None:
                self._recording = stack.enter_context(recording)
                stack.callback(self._end)
            yield
            if recording is not None:
                self._publish(recording)

    def _begin(self, key: str, draft: Draft) -> EntryRecording | None:
        reason = _no_gain(draft)
        if reason is not None:
            logger.info("Cache: nothing is written to %s: %s", self._folder, reason)
            return None
        try:
            return EntryRecording(self._store, key, self._checkpoint, draft, self._options.stats)
        except BlockingIOError:
            logger.info("Cache: another load is writing this entry of %s; this one writes nothing", self._folder)
        except OSError as error:
            self._warn(error)
        return None

    def _publish(self, recording: EntryRecording) -> None:
        recording.wait()  # what a layer raises after it was written is no trouble of the cache, an `OSError` included
        try:
            recording.finish()
        except OSError as error:
            self._warn(error)
            return
        logger.info("Cache: wrote %s to %s", format_bytes(recording.nbytes), self._folder)
        self.result = "rebuilt" if self._damaged else "written"

    def _end(self) -> None:
        self._recording = None

    def _warn(self, error: OSError) -> None:
        logger.warning("Cache: nothing was written to %s: %s", self._folder, error.strerror or error)


def open_cache(
    checkpoint: Checkpoint,
    options: LoadOptions,
    on_layer: OnFinished,
    trust_remote_code: bool,
    ranks: Alone = ALONE,
) -> NoCache:
    """The cache that the options ask for; raises `PolicyError` where it cannot be a folder."""
    if options.cache is None:
        return NoCache(checkpoint, options, on_layer, ranks)
    folder = Path(options.cache).expanduser()
    if _is_file(folder):
        raise PolicyError(f"the cache {str(folder)!r} is a file; give a folder, which is made where there is none")
    return FolderCache(folder, checkpoint, options, on_layer, trust_remote_code, ranks)


def _is_file(folder: Path) -> bool:
    """Whether something is there that is no folder; what cannot be looked at is found out where it is used."""
    try:
        return folder.exists() and not folder.is_dir()
    except OSError:
        return False


def _no_gain(draft: Draft) -> str | None:
    """Why an entry would be of no use, or None."""
    if any(assignment.stored is not None for assignment in draft.assignments):
        return "the checkpoint itself is quantized"
    final, stored = draft.plan.memory.final_bytes, draft.index.total_bytes
    return None if final < stored else "it would be as large as the checkpoint"


def _statistics(entry: Entry) -> dict[str, Tensor] | None:
    values = entry.read_json(STATISTICS)
    return None if values is None else {name: torch.tensor(row, dtype=torch.float64) for name, row in values.items()}


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Whatever is wrong with the files read inside, it is the entry that is damaged."""
    try:
        yield
    except NonFiniteWeightError:
        raise  # it is what was written, and what the checkpoint has
    except (CheckpointError, RouteError) as error:
        raise DamagedEntryError(str(error)) from error
