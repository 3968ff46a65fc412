"""What the JSON of any request must keep to, whatever its fields are called: size, depth, numbers, encoding."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .api_errors import bad_request

MAX_PARTS = 200_000
"""Objects, lists and fields: each takes far longer than text of its size, and nothing else runs while it is parsed."""
MAX_DEPTH = 64
"""Objects and lists in each other: templates, copies and encoders of nested values recurse."""
MAX_INTEGER = 1 << 64
"""Python's integers have no end; tensors, random seeds and text in a template do."""
_STRING = r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'  # one that does not end goes to the end, so that all are found in one pass
_STRINGS = re.compile(_STRING, re.DOTALL)
_STRINGS_OF_BYTES = re.compile(_STRING.encode(), re.DOTALL)
NAMED_DEPTH = 5
"""Keys of a place that an error names, as in `messages[2].content[0].text`."""


def parse_json(text: str | bytes | bytearray, field: str | None = None) -> object:
    """The value of a JSON text. Raises `ApiError` (400) for what is no JSON, or not in the bounds of this module.

    `field` is the one of the request that holds the text, which errors name; the whole body without it, and then they
    name the place in the body.
    """
    what = f"`{field}`" if field else "the body"
    if _has_too_many_parts(text):
        raise bad_request(f"{what} has more than {MAX_PARTS} objects, lists and fields", field)
    try:
        parsed: object = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{what} is not JSON: {error}", field) from error
    try:
        _check([parsed])
    except _OutOfBounds as wrong:
        place = field or _named(wrong.keys)
        raise bad_request(f"`{place}` {wrong}" if place else f"the body {wrong}", place or None) from wrong
    return parsed


def _has_too_many_parts(text: str | bytes | bytearray) -> bool:
    """Whether a JSON text has more than `MAX_PARTS` objects, lists and fields, found without making any of them."""
    if isinstance(text, str):
        return _exceeds(text, _STRINGS, *"{[:")
    return _exceeds(text, _STRINGS_OF_BYTES, b"{", b"[", b":")


def _exceeds(text: Any, strings: re.Pattern[Any], *signs: Any) -> bool:
    if sum(map(text.count, signs)) <= MAX_PARTS:
        return False
    count: int = 0
    end = 0
    for string in strings.finditer(text):  # those in strings do not count
        count += sum(text.count(sign, end, string.start()) for sign in signs)
        end = string.end()
        if count > MAX_PARTS:
            return True
    count += sum(text.count(sign, end) for sign in signs)
    return count > MAX_PARTS


class _OutOfBounds(Exception):
    """A value that no request may have, and the keys that lead to it."""

    def __init__(self, keys: tuple[str | int, ...], why: str) -> None:
        super().__init__(why)
        self.keys = keys


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check(root: list[object]) -> None:
    """Look at the values below `root`, which is no part of them, without recursion."""
    waiting: list[tuple[Any, tuple[str | int, ...]]] = [(root, ())]
    while waiting:
        holder, keys = waiting.pop()
        if len(keys) > MAX_DEPTH:
            raise _OutOfBounds(keys[1:], f"has objects and lists in each other, more than {MAX_DEPTH} deep")
        if isinstance(holder, dict) and not all(map(_encodes, holder)):
            raise _OutOfBounds(keys[1:], f"has a name with {_SURROGATE}")
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, dict | list):
                waiting.append((value, (*keys, key)))
            elif (why := _why_not(value)) is not None:
                raise _OutOfBounds((*keys, key)[1:], why)


_SURROGATE = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"


def _why_not(value: object) -> str | None:
    if isinstance(value, str):
        return None if _encodes(value) else f"has {_SURROGATE}"
    if isinstance(value, float):
        return None if math.isfinite(value) else "is a number that is too large"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "is an integer of more than 64 bits"
    return None


def _encodes(text: str) -> bool:
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def _named(keys: tuple[str | int, ...]) -> str:
    place = ""
    for key in keys[:NAMED_DEPTH]:
        place += f"[{key}]" if isinstance(key, int) else f".{key}" if place else key
    return place
