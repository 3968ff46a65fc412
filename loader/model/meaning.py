"""What the codes and scales of quantized modules mean, as `schemes.stored.quantload` reads it from a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..geometry.layout import WeightLayout
from ..schemes.stored.quantload import FORMAT_VERSION
from .quantized import CodedModule


def meaning(modules: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """`formats`, `shapes` and `transposed` of the weights of modules with a scheme, given with their names."""
    formats: dict[str, str] = {}
    shapes: dict[str, list[int | None]] = {}
    transposed: list[str] = []
    for module_name, module in modules:
        for key, layout in module.scheme.layouts(module).items():
            name = f"{module_name}.{key}"
            formats[name], shapes[name] = layout.format.name, [layout.experts, layout.rows, layout.columns]
            if module.transposed if isinstance(module, CodedModule) else module.is_transposed:
                transposed.append(name)
    return {"format_version": FORMAT_VERSION, "formats": formats, "shapes": shapes, "transposed": transposed}


def can_be_read(layout: WeightLayout) -> bool:
    """Whether `read_quantload` reads a weight as it is held: no scale is that of a whole expert."""
    return layout.experts is None or all(scale.block_rows for scale in layout.format.scales)
