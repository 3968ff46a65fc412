"""A remote checkpoint: its small files in a folder here for as long as it is used, its weights where they are."""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

from ...errors import CheckpointError, MissingShardError, ModelNotFoundError, QuantloadError
from ...options import LoadOptions
from ..files import Fetches, NoteSource, ReadAhead
from ..identity import FileIdentities
from ..other_kinds import names_error, some
from ..paths import locate
from ..small_files import largest_allowed
from ..source import Reads
from .blocks import Blocks, schedule
from .client import Client, Counters, Tag, total
from .modeling_code import modeling_code
from .requests import Requests
from .side_by_side import side_by_side
from .source import RemoteSource, held_for_later, read_bytes
from .window import CONNECTIONS, Sizes, choose_sizes

_WEIGHTS = ".safetensors"
USUAL_NAMES = (
    *(
        "config.json",
        "generation_config.json",
        "hf_quant_config.json",
        "quantize_config.json",
    ),
    *("quant_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "modules.json", "1_Pooling/config.json", "README.md", "LICENSE"),
)
"""What is asked for where a server does not say which files it has."""


class RemoteFiles:
    """Files that `client` reaches. The folder `root` is made here, and removed by `close` or with this object."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.shown = client.shown
        self.root = Path(tempfile.mkdtemp(prefix="quantload-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self._known: dict[str, Tag | None] = {}
        self._counters: list[Counters] = []
        self._requests = self._counted(None)
        self._local = FileIdentities(self.root)
        self._names: list[str] | None = None
        self._listed = False
        self._gathered: set[str] = set()

    @property
    def counters(self) -> Counters:
        """What was asked of the server so far, all in all."""
        return total(self._counters)

    def source(self, options: LoadOptions | None = None) -> RemoteSource:
        """The files where they are."""
        chosen = options or LoadOptions()

        def sizes(total_bytes: int) -> Sizes:
            return choose_sizes(chosen, total_bytes)

        return RemoteSource(self._counted(chosen.retries), sizes)

    def read_ahead(self, options: LoadOptions, total_bytes: int) -> ReadAhead:
        """What the window takes, and the library below it."""
        sizes = choose_sizes(options, total_bytes)
        return ReadAhead(sizes.nbytes, sizes.connections * self._client.client_bytes)

    def gather(self, patterns: Iterable[str]) -> None:
        """Fetch the small files whose names match."""
        patterns = tuple(patterns)
        while True:
            # Code names more code, so that there may be more after each round.
            wanted = [
                name
                for name in self._candidates()
                if name not in self._gathered and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            ]
            if not wanted:
                return
            side_by_side(self._fetch, wanted, CONNECTIONS)
            self._gathered.update(wanted)

    def note(self, names: Iterable[str]) -> None:
        """Remember files: those that were fetched as they are here, others as they are there."""
        wanted = list(names)
        self._local.note(name for name in wanted if not name.endswith(_WEIGHTS))
        unseen = [name for name in wanted if name.endswith(_WEIGHTS) and name not in self._known]
        side_by_side(self._requests.note, unseen, CONNECTIONS)

    def version(self, name: str) -> tuple[str | int | None, ...]:
        """What the server says of it."""
        tag = self._known[name]
        assert tag is not None
        return tuple(tag)

    def fingerprint(self, name: str) -> tuple[str | int | None, ...]:
        """Where it is, and what the server says of it, which tells its versions apart but not other files from it.

        Raises `CheckpointError` where it does not tell them apart.
        """
        self.note([name])
        tag = self._known[name]
        if tag is None or (tag.etag is None and tag.modified is None and tag.version is None):
            raise CheckpointError(
                f"{name}: {self.shown} says neither an ETag nor a date of it, by which an entry of the cache could be "
                f"found again; load it without a cache, or with cache_verify full"
            )
        return self.shown, *tag

    def check_unchanged(self) -> None:
        """Raise `ChangedFileError` unless all files are what they were when they were first looked at."""
        self._local.check_unchanged()
        side_by_side(self._requests.note, list(self._known), CONNECTIONS)

    def foresee(self, batches: Iterable[Reads], options: LoadOptions) -> Fetches:
        """What a run will ask of the server."""
        batches = list(batches)
        sizes = choose_sizes(options, read_bytes(batches))
        blocks = Blocks(batches, sizes.request_bytes)
        plan = schedule(blocks, held_for_later(sizes))
        return Fetches(blocks.needed_bytes, plan.fetched_bytes, len(plan.stays))

    def tell(self, note: NoteSource) -> None:
        """Say what was asked of the server so far."""
        counters = self.counters
        note(counters.requests, counters.retries, counters.nbytes, counters.connections)

    def no_model(self, *, has_config: bool) -> QuantloadError:
        """The error for where there is no model, or a config without weights."""
        where = self._client.shown
        names = [name for name in self._names or () if "/" not in name]
        found = names_error(where, names, has_config=has_config)
        if found is not None:
            return found
        if has_config and self._names is None:
            return ModelNotFoundError(
                f"{where} has a config.json, but neither model.safetensors nor model.safetensors.index.json; restore "
                f"the one that is missing, or set transformers_weights in config.json to the name of a single file "
                f"(this server does not say which files it has)"
            )
        if has_config:
            return ModelNotFoundError(
                f"{where} has a config.json, but neither model.safetensors nor model.safetensors.index.json, nor other "
                f"weights; give the address of the folder the model was saved to"
            )
        inner = sorted(
            f"{where}/{name.removesuffix('/config.json')}"
            for name in self._names or ()
            if name.endswith("/config.json")
        )
        if inner:
            return ModelNotFoundError(f"{where} has no config.json; give the address of the model: {some(inner)}")
        return ModelNotFoundError(
            f"{where} has no config.json; give the address of the folder that has the config.json of a model"
        )

    def close(self) -> None:
        """Remove the folder."""
        self._remove()

    def _counted(self, retries: int | None) -> Requests:
        requests = Requests(self._client, retries, self._known)
        self._counters.append(requests.counters)
        return requests

    def _candidates(self) -> list[str]:
        if not self._listed:
            (self._names,) = side_by_side(Requests.names, [self._requests], 1)
            self._listed = True
        return [*USUAL_NAMES, *modeling_code(self.root)] if self._names is None else self._names

    def _fetch(self, name: str, stopping: Callable[[], bool]) -> None:
        path, most = locate(self.root, name), largest_allowed(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                self._requests.copy(name, file, most, stopping)
        except MissingShardError:
            path.unlink()
            if path.parent != self.root:
                with contextlib.suppress(OSError):  # something else is in there
                    path.parent.rmdir()
