"""quantload's own form of a checkpoint: codes and scales as its modules hold them.

What `schemes.stored.quantload` reads. No other tool does, and nothing has to fit one: any number of columns is stored,
and each weight has its format and its shape in `config.json`, experts that are alike together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...geometry.layout import WeightLayout
from ...kernels.formats import FORMATS, WeightFormat
from ..stored.quantload import FORMAT_VERSION, METHOD, alike
from .weights import SOURCES, ExportedTensor, ExportedWeight, ExportFormat, NamedModules


def _weight(fmt: WeightFormat) -> ExportedWeight:
    tensors = zip(fmt.suffixes, SOURCES, strict=False)
    return ExportedWeight(tuple(ExportedTensor(f"weight{suffix}", source) for suffix, source in tensors), {})


WEIGHTS: Mapping[str, ExportedWeight] = {name: _weight(fmt) for name, fmt in FORMATS.items() if fmt.ocp is None}


def quantization_config(named: NamedModules) -> dict[str, Any]:
    """The format and the shape of every weight, by its name; a `*` stands for the numbers of experts that are alike."""
    mixed = {f"{alike(module)}.weight" for module in named.kept}
    together: dict[str, dict[tuple[str, int | None, int, int], list[str]]] = {}
    for name, layout in named.weights.items():
        together.setdefault(alike(name), {}).setdefault(_said(layout), []).append(name)
    described = {
        name: kind
        for pattern, kinds in together.items()
        for kind, names in kinds.items()
        for name in ([pattern] if len(kinds) == 1 and pattern not in mixed else names)
    }
    return {
        "format_version": FORMAT_VERSION,
        "formats": {name: fmt for name, (fmt, *_) in described.items()},
        "quant_method": METHOD,
        "shapes": {name: shape for name, (_, *shape) in described.items()},
        "transposed": [],
    }


def _said(layout: WeightLayout) -> tuple[str, int | None, int, int]:
    return layout.format.name, layout.experts, layout.rows, layout.columns


OWN = ExportFormat(METHOD, WEIGHTS, quantization_config, frozenset(WEIGHTS))
