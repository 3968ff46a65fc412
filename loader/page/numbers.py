"""Numbers as people read them: three digits that count, and a dash for what nobody measured."""

from __future__ import annotations

import math

from ..memory.amounts import GIB, KIB, MIB, TIB

NOT_MEASURED = "\N{EN DASH}"


def size(nbytes: float, digits: int = 3) -> str:
    """Bytes in the binary unit that reads best, such as `5.76 GiB`."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= unit:
            return f"{_digits(nbytes / unit, digits)} {name}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds; milliseconds below 0.1 s, minutes and seconds from 100 s on."""
    if seconds < 0.1:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def count(value: int) -> str:
    """A number of elements, such as `5.5 M`."""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return str(value)


def share(value: float | None) -> str:
    """A fraction in per cent."""
    return NOT_MEASURED if value is None else f"{value:.2%}"


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio with its unit."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.1f} dB"


def several(number: int, thing: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _digits(value: float, digits: int) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}"
