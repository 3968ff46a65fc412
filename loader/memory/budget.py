"""Byte counts as people write them, and the check of a plan against the limit a user set."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from ..errors import MemoryBudgetError, PolicyError

if TYPE_CHECKING:
    from .planner import MemoryPlan

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {
    "": 1,
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

SMALLEST_USEFUL_STAGING = MIB

# MXFP4 stores 4 bits an element and 8 bits per 32 elements: 4.25 bits where the checkpoint has 16.
_MXFP4_OF_16_BIT = Fraction(17, 64)


def parse_bytes(amount: str | int) -> int:
    """Bytes in `amount`: an integer, or text such as `16GiB`, `500MB`, `1.5 GiB` or `123`.

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB and the bare letters K, M, G, T are powers of 1024; case
    does not matter. Raises `PolicyError` for anything else, negative amounts and fractions of a byte included.
    """
    if isinstance(amount, int) and not isinstance(amount, bool):
        if amount < 0:
            raise PolicyError(f"{amount} bytes: give zero or more")
        return amount
    match = _AMOUNT.fullmatch(amount.strip().lower()) if isinstance(amount, str) else None
    if match is None or match[2] not in _UNITS:
        raise PolicyError(f"{amount!r} is not an amount of memory; write 16GiB, 500MB or a number of bytes")
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


def check_budget(plan: MemoryPlan, limit: int | None) -> None:
    """Raise `MemoryBudgetError` where `plan.peak_bytes` is over `limit` (bytes; None is no limit).

    The message gives the need, the limit and every change that would help, with its numbers.
    """
    if limit is None or plan.peak_bytes <= limit:
        return
    advice = "; or ".join(_advice(plan, limit))
    raise MemoryBudgetError(
        f"the load needs {format_bytes(plan.peak_bytes)} ({plan.peak_bytes} bytes:"
        f" model {format_bytes(plan.final_bytes)} + staging {format_bytes(plan.staging_bytes)}"
        f" + overhead {format_bytes(plan.slack_bytes)}), the limit is"
        f" {format_bytes(limit)} ({limit} bytes), {format_bytes(plan.peak_bytes - limit)} short: {advice}"
    )


def _advice(plan: MemoryPlan, limit: int) -> list[str]:
    short = plan.peak_bytes - limit
    advice = []
    staging = plan.staging_bytes - short
    if staging >= SMALLEST_USEFUL_STAGING:
        advice.append(
            f"make the staging arena smaller: --staging {staging // MIB}MiB"
            f" instead of {format_bytes(plan.staging_bytes)}"
        )
    saved = _saved_by_mxfp4(plan)
    if saved > 0:
        advice.append(f"choose a narrower scheme: quark_mxfp4 would take about {format_bytes(saved)} less")
    kept = plan.quantizable_kept_bytes
    if kept > 0:
        change = "remove ignore patterns" if plan.parameters_quantized else "quantize"
        advice.append(
            f"{change}: {format_bytes(kept)} of linear and experts weights are kept as stored"
            f" (quark_mxfp4 would take up to {format_bytes(round(kept * (1 - _MXFP4_OF_16_BIT)))} less)"
        )
    advice.append(f"raise the limit: --max-memory {-(-plan.peak_bytes // MIB)}MiB")
    return advice


def _saved_by_mxfp4(plan: MemoryPlan) -> int:
    quantized = [total for scheme, total in plan.by_scheme.items() if scheme != "none"]
    return sum(max(0, total.bytes_out - round(total.bytes_in * _MXFP4_OF_16_BIT)) for total in quantized)
