"""The formats a checkpoint can be written in, and which scheme each of them can hold."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import PolicyError
from ..base import LinearScheme, MoEScheme
from ..registry import ENTRIES, SchemeEntry
from .compressed_tensors import COMPRESSED_TENSORS
from .quark import QUARK
from .weights import ExportedWeight, ExportFormat

EXPORT_FORMATS: dict[str, ExportFormat] = {each.name: each for each in (QUARK, COMPRESSED_TENSORS)}


def get_export_format(name: str) -> ExportFormat:
    """The checkpoint format of a name; `PolicyError` lists the names there are."""
    try:
        return EXPORT_FORMATS[name]
    except (KeyError, TypeError):
        raise PolicyError(f"format is {name!r}; choose one of {', '.join(EXPORT_FORMATS)}") from None


def formats_of(entry: SchemeEntry) -> list[str]:
    """The checkpoint formats a scheme can be written in."""
    schemes = [scheme for scheme in (entry.linear, entry.experts) if scheme is not None]
    return [
        export.name
        for export in EXPORT_FORMATS.values()
        if schemes and all(scheme.format_name in export.weights for scheme in schemes)
    ]


def exported_weight(scheme: LinearScheme | MoEScheme, export: ExportFormat) -> ExportedWeight:
    """How the weights of a scheme are stored in a checkpoint format; `PolicyError` names the pairs there are."""
    try:
        return export.weights[scheme.kernels.format.name]
    except KeyError:
        pairs = "; ".join(f"{name}: {', '.join(schemes)}" for name, schemes in _pairs())
        raise PolicyError(
            f"{scheme.name} cannot be written as {export.name}, which has no such weights; there are: {pairs}"
        ) from None


def _pairs() -> Iterable[tuple[str, list[str]]]:
    for name in EXPORT_FORMATS:
        yield name, [entry.name for entry in ENTRIES if name in formats_of(entry)]
