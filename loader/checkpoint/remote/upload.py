"""A checkpoint that is written to an object store: shard by shard through this disk, `config.json` last.

A shard is written to a temporary folder, uploaded when it is finished, and removed here: the disk has to hold those
that are open. A run that is interrupted leaves that folder and its journal, and the next one to the same address on
this machine takes up the shards that are uploaded already.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...addresses import OBJECT_STORES, Address, parse_address, scheme_of
from ...errors import OutputError, PolicyError
from ..output import OutputFolder
from ..writer import Extent, ShardPlan
from .objects import open_store, told

_LAST = "config.json"
"""What a checkpoint is not one without."""
_UPLOADED = "uploaded"
PART_BYTES = 8 << 20
_PARTS = 2
LIBRARY_BYTES = (_PARTS + 2) * PART_BYTES
"""The most that the library holds of a file on its way."""


class UploadFolder(OutputFolder):
    """A folder of an object store on its way; the attributes of `OutputFolder` have the same meaning.

    Raises `OutputError` where there is a checkpoint already, or the store says no.
    """

    def __init__(self, address: Address, store: Any, key: str) -> None:
        name = hashlib.sha256(address.url.encode()).hexdigest()[:16]
        super().__init__(Path(tempfile.gettempdir()) / f"quantload-{name}", key)
        self._shown, self._store = address.shown, store

    def finished(self, plan: ShardPlan) -> dict[str, Any] | None:
        """The notes of a shard that an earlier run uploaded, if it is still there."""
        found = self._finished.get(plan.path)
        if found is None or self._version(plan.path) != found.notes[_UPLOADED]:
            return None
        return {name: note for name, note in found.notes.items() if name != _UPLOADED}

    def record(self, plan: ShardPlan, extents: Sequence[Extent], notes: Mapping[str, Any]) -> None:
        """A shard is on this disk: upload it, and remove it here."""
        self._upload(plan.path)
        super().record(plan, extents, {**notes, _UPLOADED: self._version(plan.path)})
        with self._explained():
            (self.files / plan.path).unlink()

    def size(self) -> int:
        """Bytes of all files so far."""
        uploaded: int = sum(found.notes[_UPLOADED][0] for found in self._finished.values())
        return super().size() + uploaded

    def publish(self) -> None:
        """Upload the small files, and `config.json` at the end."""
        names = [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda each: (each == _LAST, each)):
            self._upload(name)
        with self._explained():
            shutil.rmtree(self.files)
            self._published = True
            self._leave()

    def _check_absent(self) -> None:
        if self._version(_LAST) is not None:
            raise OutputError(f"{self._shown} has a {_LAST} already; give another folder, or remove it first")

    def _upload(self, name: str) -> None:
        try:
            self._store.put(name, self.files / name, chunk_size=PART_BYTES, max_concurrency=_PARTS)
        except Exception as error:
            raise self._refused(name, "written", error) from None

    def _version(self, name: str) -> list[int | str | None] | None:
        """Bytes and version of an object, as the journal says them; None where there is none."""
        try:
            meta = self._store.head(name)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._refused(name, "looked at", error) from None
        return [meta["size"], meta["e_tag"], meta["version"]]

    def _refused(self, name: str, done: str, error: Exception) -> OutputError:
        said = str(told(error)) or "it is not there"
        return OutputError(
            f"{self._shown}/{name} cannot be {done}: {said}; check credentials and network, and run it again"
        )


def upload_to(out: str) -> Callable[[str], UploadFolder]:
    """What makes the folder for a key of what is written. Raises `PolicyError` for a URL that cannot be written to."""
    address = parse_address(out)
    if address.scheme in ("http", "https") or address.scheme not in OBJECT_STORES:
        raise PolicyError(f"{address.shown} cannot be written to; give a folder, or one of s3://, gs:// and az://")
    if address.fault is not None:
        raise PolicyError(address.fault)
    store = open_store(address)
    return lambda key: UploadFolder(address, store, key)


def is_url(out: str | Path) -> bool:
    """Whether something is to be written elsewhere."""
    return isinstance(out, str) and scheme_of(out) is not None


def shown(out: str) -> str:
    """A URL without what may let somebody in."""
    return parse_address(out).shown
