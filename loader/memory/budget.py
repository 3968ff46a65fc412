"""The check of a plan against the limit a user set, and what a load says that ran out of memory all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from ..errors import MemoryBudgetError
from ..shortage import refused, shortage_behind, spare_address_space
from .amounts import MIB, format_bytes
from .limits import process_limits

if TYPE_CHECKING:
    from .planner import MemoryPlan

SMALLEST_USEFUL_STAGING = MIB

# MXFP4 stores 4 bits an element and 8 bits per 32 elements: 4.25 bits where the checkpoint has 16.
_MXFP4_OF_16_BIT = Fraction(17, 64)


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


@contextlib.contextmanager
def memory_running_out(plans: Sequence[MemoryPlan]) -> Iterator[None]:
    """Whatever finds no memory inside is a `MemoryBudgetError` that names it, what was predicted, and the limits.

    `plans` holds the plan of the load once there is one.
    """
    spare_address_space()
    try:
        yield
    except Exception as error:
        if shortage_behind(error) is None:
            raise
        found = refused("what a load needs beside its tensors", error)
        raise MemoryBudgetError(f"{found}; {_expected(plans)}") from error


def _expected(plans: Sequence[MemoryPlan]) -> str:
    """What a load was predicted to take, and within which limits."""
    predicted = "the load had not been planned yet"
    for plan in plans[-1:]:
        predicted = (
            f"the predicted peak of the load is {format_bytes(plan.peak_bytes)} (model {format_bytes(plan.final_bytes)}"
            f" + staging {format_bytes(plan.staging_bytes)} + overhead {format_bytes(plan.slack_bytes)})"
        )
    limits = "; ".join(map(str, process_limits())) or "no limit of this process is known: the machine has no more"
    return f"{predicted}; {limits}"


def smaller_staging(plan: MemoryPlan, short: int) -> list[str]:
    """Advice to make the staging arena smaller by `short` bytes, where it is large enough for that."""
    staging = plan.staging_bytes - short
    if staging < SMALLEST_USEFUL_STAGING:
        return []
    size = format_bytes(plan.staging_bytes)
    return [f"make the staging arena smaller: --staging {staging // MIB}MiB instead of {size}"]


def _advice(plan: MemoryPlan, limit: int) -> list[str]:
    short = plan.peak_bytes - limit
    advice = smaller_staging(plan, short)
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
