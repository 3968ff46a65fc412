"""A JSON scanner for untrusted headers: one pass over bytes, no tree, so hostile input costs no memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ..errors import CheckpointError

SPACE = rb"[ \t\n\r]*+"
STRING = rb'"((?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+)"'
UINT = rb"(?:0|[1-9][0-9]{0,19})"

_KEY = re.compile(SPACE + STRING + SPACE + b":" + SPACE)
_PAIR = re.compile(SPACE + STRING + SPACE + b":" + SPACE + STRING + SPACE + b"([,}])")
_OPEN = re.compile(SPACE + rb"\{" + SPACE + rb"(\}?)")
_NEXT = re.compile(SPACE + b"([,}])")
_BLANK = re.compile(SPACE)
_MAX_SKIPPED = 1 << 20
MAX_NAME = 4096
"""Bytes of a name of a tensor; more than a hundred are rare."""


SHOWN_TEXT, SHOWN_BYTES = 60, 8


def shown_bytes(data: bytes | bytearray, position: int) -> str:
    """What stands at a place, for a message: text as it is, of anything else some bytes in hexadecimal."""
    found = bytes(data[position : position + SHOWN_TEXT])
    if not found:
        return "the end"
    text = found.decode("utf-8", "ignore" if position + SHOWN_TEXT < len(data) else "replace")
    is_text = all(each.isprintable() or each in "\t\r\n" for each in text) and len(text.encode()) > len(found) - 4
    if is_text and "\N{REPLACEMENT CHARACTER}" not in text:
        return repr(text)
    return f"bytes that are no text ({found[:SHOWN_BYTES].hex(' ')}{' ...' if len(found) > SHOWN_BYTES else ''})"


@dataclass(slots=True)
class JsonScanner:
    """Walks the bytes of one JSON object and raises `error` at the first byte that breaks the expected shape.

    `what` names the bytes in messages, for instance the shard they came from.
    """

    data: bytes | bytearray
    what: str
    error: type[CheckpointError] = CheckpointError

    def fail(self, position: int, expected: str) -> CheckpointError:
        """The error to raise for the bytes at `position`."""
        found = shown_bytes(self.data, position)
        return self.error(
            f"{self.what}: expected {expected} at byte {position:,}, found {found}: it is damaged, copy or download it "
            f"again"
        )

    def decode(self, raw: bytes, position: int) -> str:
        """The text of a JSON string whose inner bytes are `raw`; must be UTF-8 without lone surrogates."""
        try:
            if b"\\" not in raw:
                return raw.decode()
            text: str = json.loads(b'"' + raw + b'"')
            text.encode()
        except (UnicodeError, ValueError):
            raise self.fail(position, "a string in valid UTF-8") from None
        return text

    def name(self, raw: bytes, position: int) -> str:
        """The text of a JSON string that is a name: at most `MAX_NAME` bytes of it."""
        if len(raw) > MAX_NAME:
            shown = shown_bytes(raw, 0)
            raise self.error(
                f"{self.what}: the name {shown}... at byte {position} has {len(raw):,} bytes, at most {MAX_NAME:,} "
                f"are read; this is no ordinary checkpoint"
            )
        return self.decode(raw, position)

    def open_object(self, position: int) -> tuple[int, bool]:
        """Steps into an object: the position of its first key, and whether it is empty (then the one after it)."""
        match = _OPEN.match(self.data, position)
        if match is None:
            raise self.fail(position, "a JSON object")
        return match.end(), bool(match[1])

    def key(self, position: int) -> tuple[str, int]:
        """The key at `position` and the position of its value."""
        match = _KEY.match(self.data, position)
        if match is None:
            raise self.fail(position, "a name in double quotes and a colon")
        return self.decode(match[1], position), match.end()

    def after_value(self, position: int) -> tuple[int, bool]:
        """Steps over what follows a value: the next position, and whether the object ended there."""
        match = _NEXT.match(self.data, position)
        if match is None:
            raise self.fail(position, "',' or '}'")
        return match.end(), match[1] == b"}"

    def end(self, position: int) -> None:
        """Checks that only white space follows `position`."""
        match = _BLANK.match(self.data, position)
        if match is not None and match.end() != len(self.data):
            raise self.fail(match.end(), "nothing more")

    def strings(self, position: int, limit: int) -> tuple[dict[str, str], int]:
        """An object of at most `limit` strings at `position`, and the position after it; no name twice."""
        found: dict[str, str] = {}
        position, ended = self.open_object(position)
        data, match_pair = self.data, _PAIR.match
        raw_before, value = b"", ""  # one shard follows another a thousand times
        while not ended:
            match = match_pair(data, position)
            if match is None:
                raise self.fail(position, "a name and a value, both in double quotes")
            raw_name, raw_value, closing = match.groups()
            name = self.name(raw_name, position)
            if name in found:
                raise self.error(f"{self.what}: {name[:200]!r} appears twice; write the file again")
            if len(found) == limit:
                raise self.error(f"{self.what}: more than {limit:,} entries; this is no ordinary checkpoint")
            if raw_value != raw_before:
                raw_before, value = raw_value, self.decode(raw_value, match.start(2))
            found[name] = value
            position, ended = match.end(), closing == b"}"
        return found, position

    def skip(self, position: int) -> int:
        """The position after the JSON value at `position`, whatever it is, up to 1 MiB of it in UTF-8."""
        text = bytes(self.data[position : position + _MAX_SKIPPED]).decode("utf-8", "surrogateescape")
        try:
            _, length = json.JSONDecoder().raw_decode(text)
            return position + len(text[:length].encode())  # strict: what was no UTF-8 is none now
        except (ValueError, RecursionError):
            raise self.fail(position, "a JSON value of at most 1 MiB in UTF-8") from None
