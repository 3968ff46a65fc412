"""Byte counts as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from ..errors import PolicyError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": TIB,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
}


_AMOUNT = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)", re.ASCII)


def parse_bytes(amount: str | int, what: str = "") -> int:
    """Bytes in `amount`: an integer, or text such as `16GiB`, `500MB`, `1.5 GiB` or `123B`.

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB and the bare letters K, M, G, T are powers of 1024; case
    does not matter. Raises `PolicyError` for anything else: text without a unit, negative amounts and fractions of a
    byte included; its message begins with `what` the amount is of.
    """
    try:
        return _parsed(amount)
    except PolicyError as error:
        raise PolicyError(f"{what}: {error}") if what else error from None


def _parsed(amount: str | int) -> int:
    if isinstance(amount, int) and not isinstance(amount, bool):
        if amount < 0:
            raise PolicyError(f"{amount} bytes: give zero or more")
        return amount
    match = _AMOUNT.fullmatch(amount.strip().lower()) if isinstance(amount, str) else None
    if match is not None and not match[2]:
        raise PolicyError(f"{amount!r} has no unit; write {match[1]}GiB, {match[1]}MB or, for bytes, {match[1]}B")
    if match is None or match[2] not in _UNITS:
        raise PolicyError(f"{amount!r} is not an amount of memory; write 16GiB, 500MB or 4096B")
    size = Fraction(match[1]) * _UNITS[match[2]]
    if _UNITS[match[2]] == 1 and size.denominator != 1:
        raise PolicyError(
            f"{amount!r} is a fraction of a byte; write a whole number of bytes, or add a unit: {match[1]}GiB"
        )
    return round(size)


def format_bytes(size: int) -> str:
    """`size` (bytes, may be negative) in the binary unit that reads best, such as `5.755 GiB`."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.3f} {name}"
    return f"{size} B"


def typed_bytes(size: int) -> str:
    """`size` (bytes) as an option takes it, exactly: `16MiB`, `12KiB`, or `4097B`."""
    units = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
    unit, name = next((unit, name) for unit, name in units if size % unit == 0)
    return f"{size // unit}{name}"
