"""The config of an entry: that of the model, and what its codes and scales mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..checkpoint.resolve import Checkpoint
from ..model.quantized import QuantizedLinear
from ..model.skeleton import Assignment
from ..schemes.stored.quantload import FORMAT_VERSION


def entry_config(checkpoint: Checkpoint, assignments: Iterable[Assignment]) -> dict[str, Any]:
    """`config.json` of the checkpoint with a `quantization_config` that `schemes.stored.quantload` reads."""
    formats: dict[str, str] = {}
    shapes: dict[str, list[int | None]] = {}
    transposed: list[str] = []
    for assignment in assignments:
        if assignment.scheme is None:
            continue
        module: Any = assignment.module
        for key, layout in assignment.scheme.layouts(module).items():
            name = f"{assignment.name}.{key}"
            formats[name], shapes[name] = layout.format.name, [layout.experts, layout.rows, layout.columns]
            if module.transposed if isinstance(module, QuantizedLinear) else module.is_transposed:
                transposed.append(name)
    config = checkpoint.config()
    config.pop("transformers_weights", None)  # the shards have the usual names
    meaning = {"formats": formats, "shapes": shapes, "transposed": transposed}
    return config | {"quantization_config": {"quant_method": "quantload", "format_version": FORMAT_VERSION, **meaning}}
