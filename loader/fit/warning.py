"""What is said once of a scheme that is expected to hurt a model: small dense models in plain 4-bit rounding."""

from __future__ import annotations

import logging
from collections import Counter

from ..draft import Draft
from ..page.costs import BITS
from ..schemes.registry import ENTRIES
from .expected_loss import ERRORS

logger = logging.getLogger("quantload")
HURTS = 1e-2
"""Relative squared error of weights from which on small dense models are known to lose: Llama-3.1-8B-Instruct is said
to fall from 0.708 to 0.621 on average over several benchmarks with weights rounded to MXFP4, uncalibrated."""
FEWEST, MOST = 50_000_000, 15_000_000_000
"""So many quantized weights have the dense models that it is said of: larger ones bear it, smaller ones are toys."""


def scheme_warning(draft: Draft) -> str | None:
    """What is expected to hurt and what is better at that size; `None` where nothing is."""
    if any(assignment.kind == "experts" for assignment in draft.assignments):
        return None
    weights: Counter[str] = Counter()
    for assignment in draft.assignments:
        if assignment.scheme is not None and assignment.stored is None:
            layouts = assignment.scheme.layouts(assignment.module).values()
            weights[assignment.scheme.name] += sum(layout.numel for layout in layouts)
    total = sum(weights.values())
    hurting = [name for name in weights if ERRORS.get(name, 0.0) >= HURTS]
    if not FEWEST <= total <= MOST or 2 * sum(weights[name] for name in hurting) < total:
        return None
    scheme = max(hurting, key=weights.__getitem__)
    better = _better(scheme, draft.rules.policy.scale_mode)
    instead = (
        ""
        if better == scheme
        else f": {better} takes as much and is expected to lose {ERRORS[better] / ERRORS[scheme]:.2f} times that "
        f"(-q {better})"
    )
    return (
        f"{scheme} is expected to hurt a dense model of {total / 1e9:.2f} billion weights{instead}; compare says what "
        f"there is, and --fit SIZE chooses module by module"
    )


def warn_of_schemes(draft: Draft) -> None:
    """Say it in the log."""
    said = scheme_warning(draft)
    if said is not None:
        logger.warning("%s", said)


def _better(scheme: str, scale_mode: str) -> str:
    """The scheme of the least error that takes no more bits."""
    names = [entry.name for entry in ENTRIES if entry.name in ERRORS and entry.formats and entry.has_mode(scale_mode)]
    no_larger = [name for name in names if BITS[name][0][0] <= BITS[scheme][0][0]]
    return min(no_larger, key=ERRORS.__getitem__)
