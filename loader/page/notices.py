"""What a person should look at in a report, and what to do about it: nothing, for most loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .grouping import finite
from .numbers import decibels, several, share, size

LOW_SQNR = 10.0
"""Decibels: a tenth of the signal is noise. Four bits give 18 to 22 dB for weights as they usually are."""
MUCH_SATURATED = 0.05
SHOWN = 3


@dataclass(frozen=True)
class Notice:
    """Something to look at: what, and what to do."""

    what: str
    do: str


def notices(report: Mapping[str, Any]) -> list[Notice]:
    """In the order of weight."""
    return [*_state(report), *_memory(report), *_weights(report), *_quality(report["layers"])]


def _state(report: Mapping[str, Any]) -> Iterator[Notice]:
    if report["state"] == "incomplete":
        yield Notice(
            "A reload has failed part-way: the model holds weights of two checkpoints, and its forward raises.",
            "Reload it, from either checkpoint, or load it anew.",
        )


def _memory(report: Mapping[str, Any]) -> Iterator[Notice]:
    peak, limit, predicted = report["peak_bytes"], report.get("limit_bytes"), report["predicted_peak_bytes"]
    if limit is not None and peak > limit:
        yield Notice(
            f"The peak of {size(peak, 4)} was above the limit of {size(limit, 4)}.",
            "Other work in this process allocates too, or the limit is below what was predicted with --force: load in "
            "a process of its own, make --staging smaller, or raise --max-memory.",
        )
    elif peak > predicted > 0:
        yield Notice(
            f"The peak of {size(peak, 4)} was above the {size(predicted, 4)} that were predicted.",
            "Something else in this process allocated meanwhile. If nothing did, please report it with this page.",
        )
    if report["fallback_conversions"]:
        yield Notice(
            f"{several(report['fallback_conversions'], 'conversion')} of tensors had to be made whole, which takes "
            "more memory and time.",
            "Nothing to do for this load. docs/memory.md says which models need it.",
        )


def _weights(report: Mapping[str, Any]) -> Iterator[Notice]:
    found = report["non_finite"]
    if found:
        yield Notice(
            f"Weights with NaN or infinite values: {_some([each['name'] for each in found])}.",
            "Compare the file with its source and fetch it again; --strict makes an error of it.",
        )
    if report["unexpected"]:
        yield Notice(
            f"{several(len(report['unexpected']), 'tensor')} of the checkpoint, {size(report['unexpected_bytes'])}, "
            f"belong to nothing in the model: {_some(report['unexpected'])}.",
            "Were they left out on purpose? If not, config.json may be that of another version of the model.",
        )
    if report["initialized"]:
        yield Notice(
            f"Parameters that the checkpoint lacks; they have their initial values: {_some(report['initialized'])}.",
            "Is it the checkpoint of this model class, and is it complete?",
        )
    if report["untied"]:
        yield Notice(
            f"Parameters that the model ties, and that differ in the checkpoint: {_some(report['untied'])}.",
            "Look at tie_word_embeddings in config.json.",
        )


def _quality(layers: list[Mapping[str, Any]]) -> Iterator[Notice]:
    low = [layer for layer in layers if (sqnr := finite(layer["sqnr_db"])) is not None and sqnr < LOW_SQNR]
    if low:
        lowest = min(low, key=lambda layer: float(layer["sqnr_db"]))
        yield Notice(
            f"{several(len(low), 'module')} below {LOW_SQNR:.0f} dB, the lowest {lowest['name']} with "
            f"{decibels(lowest['sqnr_db'])}.",
            f"Give it more bits, --override '{lowest['name']}=fp8_per_channel', or leave it as stored, "
            f"--ignore '{lowest['name']}', and compare what the model answers.",
        )
    saturated = [layer for layer in layers if (layer["saturated_fraction"] or 0.0) > MUCH_SATURATED]
    if saturated:
        most = max(saturated, key=lambda layer: float(layer["saturated_fraction"]))
        yield Notice(
            f"{several(len(saturated), 'module')} with many weights at the largest code, the most in {most['name']}: "
            f"{share(most['saturated_fraction'])}.",
            "Try --scale-mode mse, which chooses scales by the error, or a scheme with a smaller block.",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
