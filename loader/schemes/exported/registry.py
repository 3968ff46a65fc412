"""The formats a checkpoint can be written in, and which scheme each of them can hold."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import PolicyError
from ...kernels.formats import WeightFormat
from ..base import LinearScheme, MoEScheme
from ..registry import ENTRIES, SchemeEntry
from .compressed_tensors import COMPRESSED_TENSORS
from .gpt_oss import GPT_OSS
from .modelopt import MODELOPT
from .own import OWN
from .quark import QUARK
from .weights import ExportedWeight, ExportFormat

EXPORT_FORMATS: dict[str, ExportFormat] = {
    each.name: each for each in (QUARK, COMPRESSED_TENSORS, GPT_OSS, MODELOPT, OWN)
}


def get_export_format(name: str) -> ExportFormat:
    """The checkpoint format of a name; `PolicyError` lists the names there are."""
    try:
        return EXPORT_FORMATS[name]
    except (KeyError, TypeError):
        raise PolicyError(f"format is {name!r}; choose one of {', '.join(EXPORT_FORMATS)}") from None


def formats_of(entry: SchemeEntry) -> list[str]:
    """The checkpoint formats a scheme can be written in, linear layers and experts alike."""
    return [export.name for export in EXPORT_FORMATS.values() if _holds(export, entry.linear, entry.experts)]


def expert_formats_of(entry: SchemeEntry) -> list[str]:
    """The checkpoint formats that can hold what a scheme makes of experts, whatever becomes of linear layers."""
    return [export.name for export in EXPORT_FORMATS.values() if _holds(export, None, entry.experts)]


def exported_weight(scheme: LinearScheme | MoEScheme, export: ExportFormat) -> ExportedWeight:
    """How the weights of a scheme are stored in a checkpoint format; `PolicyError` names the pairs there are."""
    try:
        return export.weights[scheme.kernels.format.name]
    except KeyError:
        pairs = "; ".join(f"{name}: {', '.join(schemes)}" for name, schemes in _pairs())
        raise PolicyError(
            f"{scheme.called} cannot be written as {export.name}, which has no such weights; there are: {pairs}"
        ) from None


def why_not_columns(scheme: LinearScheme | MoEScheme, columns: int, export: ExportFormat) -> str:
    """Why a checkpoint format cannot hold so many columns of a scheme, and what can; nothing if it can."""
    fmt, experts = scheme.kernels.format.name, isinstance(scheme, MoEScheme)
    if export.weights[fmt].divides(columns):
        return ""
    by_format: dict[str, str] = {}
    for entry in ENTRIES:
        kind = entry.experts if experts else entry.linear
        if kind is not None:
            by_format.setdefault(kind.name, entry.name)
    schemes = [name for form, name in by_format.items() if _fits(export, form, columns)]
    formats = [each.name for each in EXPORT_FORMATS.values() if _fits(each, fmt, columns)]
    ways = [f"--format {formats[0]} holds them"] if formats and not export.weights[fmt].fused else []
    ways += [f"{export.name} holds them as {', '.join(schemes)}"] if schemes else []
    return (
        f"has {columns} columns, which are no multiple of {export.weights[fmt].column_multiple}, as {export.name} "
        f"needs for {scheme.called}{' (' + '; '.join(ways) + ')' if ways else ''}"
    )


def _fits(export: ExportFormat, format_name: str, columns: int) -> bool:
    weight = export.weights.get(format_name)
    return weight is not None and not weight.fused and weight.divides(columns)


def _holds(export: ExportFormat, linear: WeightFormat | None, experts: WeightFormat | None) -> bool:
    kinds = [(fmt, own) for fmt, own in ((linear, False), (experts, True)) if fmt is not None]
    return bool(kinds) and all(export.holds(fmt, experts=own) for fmt, own in kinds)


def _pairs() -> Iterable[tuple[str, list[str]]]:
    for name in EXPORT_FORMATS:
        alike = [entry.name for entry in ENTRIES if name in formats_of(entry)]
        yield (
            name,
            alike or [f"{entry.name} of gpt-oss experts" for entry in ENTRIES if name in expert_formats_of(entry)],
        )
