"""One entry of a cache: a folder with a small checkpoint, checksums of its files, and a lock.

`entry.json` names the files and vouches for `checksums.crc32`, which vouches for them; its own checksum stands in it,
and the key, so that an entry that has another's name is none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..checkpoint.source import FileSource, read_bytes
from ..errors import DamagedEntryError
from ..kernels.system_calls import open_plain
from ..options import LoadOptions
from ..shortage import is_shortage
from .checksums import Checksums, VerifiedSource
from .locks import FileLock

LOCK, ENTRY, CHECKSUMS = "lock", "entry.json", "checksums.crc32"
FORMAT_VERSION = 2
"""Of the files beside the tensors; a reader of another version starts anew."""


@dataclass(frozen=True)
class Entry:
    """A finished entry. Its lock, which keeps others from removing it, is held until `release`."""

    folder: Path
    lock: FileLock
    checksums: Mapping[str, Checksums]

    @classmethod
    def open(cls, folder: Path, lock: FileLock) -> Self:
        """The entry in `folder`; raises `DamagedEntryError` where its description is not what was written."""
        return cls(folder, lock, _read_checksums(folder))

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(checksums.size for checksums in self.checksums.values())

    def source(self, options: LoadOptions) -> VerifiedSource:
        """Its files, checked as they are read."""
        files = FileSource(self.folder, page_cache=options.page_cache, retries=options.retries)
        return VerifiedSource(files, self.checksums)

    def read_json(self, name: str) -> Any:
        """What a JSON file of it holds; raises `DamagedEntryError` where that is not what was written."""
        with FileSource(self.folder, page_cache="keep") as files:
            source = VerifiedSource(files, self.checksums)
            return json.loads(read_bytes(source, name, 0, source.size(name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Others may remove it from now on."""
        self.lock.release()


def write_description(folder: Path, key: str, checksums: Mapping[str, Checksums]) -> None:
    """Write `checksums.crc32` and `entry.json`, which say what the other files must be, and force them to disk."""
    parts = {name: each.to_bytes() for name, each in checksums.items()}
    data = b"".join(parts.values())
    files = {name: len(part) for name, part in parts.items()}
    body = {"format_version": FORMAT_VERSION, "key": key, "files": files, "checksums_crc32": zlib.crc32(data)}
    write_file(folder / CHECKSUMS, data)
    write_file(folder / ENTRY, json.dumps({"crc32": _crc(body), "entry": body}).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file and force it to disk."""
    with open(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_checksums(folder: Path) -> dict[str, Checksums]:
    try:
        described = json.loads((folder / ENTRY).read_bytes())
        body = described["entry"]
        data = (folder / CHECKSUMS).read_bytes()
        if described["crc32"] != _crc(body) or body["checksums_crc32"] != zlib.crc32(data):
            raise ValueError("its checksum is another one")
        if body["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it is of version {body['format_version']}, {FORMAT_VERSION} is read")
        if body["key"] != folder.name:
            raise ValueError("it is the entry of another key")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if is_shortage(error):
            raise
        raise DamagedEntryError(f"{ENTRY} and {CHECKSUMS} are not what was written: {error}") from error
    checksums, at = {}, 0
    for name, size in body["files"].items():
        checksums[name] = Checksums.from_bytes(data[at : at + size])
        at += size
    return checksums


def _crc(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
