"""Seeded mutations of the files of a checkpoint: of the values of JSON, and of bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Path = tuple[str | int, ...]
VALUES: Sequence[Any] = (
    None, True, False, -1, 0, 1, 2, 7, 31, 128, 2**31, 2**63, 2**64, 10**9, 10**30, -(10**9), 0.5, 1e308, -0.0,
    float("nan"), float("inf"), "", "x", "\x00", "\ud800", "é" * 50, "a" * 5000, "re:(", "re:(a+)+$",
    "re:.*" * 30, "*" * 40,
    "../../etc/passwd", "/dev/zero", "torch.float8_e4m3fn", "float32", "bfloat16", "int8", "group", "channel", "tensor",
    [], [[]], [1], [None], ["a", 1], [-1, 0], [128, 128], [1] * 100, {}, {"": 1}, {"a": {"b": {}}}, {"0": []},
)  # fmt: skip
TOKENS: Sequence[bytes] = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\x00", b"null",
    b"true", b"NaN", b"Infinity", b"-", b"-1", b"1e999", b"0" * 30, b"9" * 25, b"[" * 300, b'{"a":' * 300, b" " * 500,
    b'"shape":[0]', b'"dtype":"F4"', b'"dtype":"U8"', b'"data_offsets":[0,0]', b'"__metadata__":{}', b'"weight_map":{}',
    b'"../x.safetensors"', b"18446744073709551616", b"9223372036854775807", b"4294967296",
)  # fmt: skip
NUMBERS: Sequence[Callable[[int], int]] = (
    lambda n: n + 1, lambda n: n - 1, lambda n: n * 2, lambda n: n // 2, lambda n: -n, lambda n: n * 8,
    lambda n: n + 32, lambda n: n * 10**9,
)  # fmt: skip


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every key of nested objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: Path) -> Any:
    """What stands at a place."""
    for key in path:
        value = value[key]
    return value


def mutate_value(rng: random.Random, value: Any, names: Sequence[str]) -> tuple[Any, str]:
    """A changed copy of nested JSON, and the place of the change; `names` are keys that files of its kind have."""
    changed = copy.deepcopy(value)
    found = list(places(changed))
    if not found or not isinstance(changed, (dict, list)):
        return copy.deepcopy(rng.choice(VALUES)), ""
    path = rng.choice(found)
    holder, key = at(changed, path[:-1]), path[-1]
    old, kind = holder[key], rng.randrange(9)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(old, int):
        holder[key] = rng.choice(NUMBERS)(old)
    elif kind == 2:
        holder[key] = copy.deepcopy(at(changed, rng.choice(found)))
    elif kind == 3:
        holder[key] = rng.choice(([old], {"a": old}, [old, old], str(old)[:9000]))
    elif kind == 4 and isinstance(holder, dict):
        holder[rng.choice(names)] = holder.pop(key)
    elif kind == 5 and isinstance(old, str):
        holder[key] = mutate_bytes(rng, old.encode("utf-8", "surrogatepass"), ()).decode("utf-8", "replace")
    elif kind == 6 and isinstance(old, (dict, list)) and old:
        inner = list(range(len(old))) if isinstance(old, list) else list(old)
        for each in sorted(rng.sample(inner, rng.randint(1, len(inner))), reverse=True, key=str):
            del old[each]
    elif kind == 7 and isinstance(holder, dict):
        holder[rng.choice(names)] = copy.deepcopy(rng.choice(VALUES))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return changed, ".".join(map(str, path))


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes], within: int | None = None) -> bytes:
    """Changed bytes: flipped, cut, repeated, overwritten, or spliced with others; all within the first `within`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = min(len(out), within or len(out))
        start = rng.randrange(end + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64)), end - start)
        kind = rng.randrange(8)
        if kind == 0 and length:
            out[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[start : start + length]
        elif kind == 2:
            out[start:start] = out[start : start + length] * rng.choice((1, 2, 50))
        elif kind == 3:
            out[start : start + length] = rng.choice(TOKENS)
        elif kind == 4:
            out[start:start] = rng.choice(TOKENS)
        elif kind == 5 and length:
            digits = [place for place in range(start, end) if 0x30 <= out[place] <= 0x39]
            if digits:
                out[rng.choice(digits[:40])] = rng.choice(b"0123456789")
        elif kind == 6 and others:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            out[start : start + length] = other[begin : begin + rng.choice((1, 8, 64, 400))]
        elif kind == 7 and rng.random() < 0.2:
            del out[start:]
        else:
            out[start : start + length] = rng.randbytes(length)
    return bytes(out)


def mutate_json(rng: random.Random, data: bytes, others: Sequence[bytes], names: Sequence[str]) -> tuple[bytes, str]:
    """A changed JSON file, mostly by values where it is JSON, and the place of the change where there is one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if value is None or rng.random() < 0.35:
        return mutate_bytes(rng, data, others), "bytes"
    where = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value, place = mutate_value(rng, value, names)
        where.append(place)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    return text.encode("utf-8", "surrogatepass"), ", ".join(where)
