"""What NVIDIA ModelOpt 0.47 writes of weights in NVFP4: `quant_method` modelopt, `quant_algo` W4A16_NVFP4.

That is ModelOpt's name for NVFP4 of weights alone; under NVFP4 it stores scales of activations too, which only data
could tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels.formats import NVFP4
from .weights import ExportedTensor, ExportedWeight, ExportFormat, NamedModules, as_scalar

VERSION = "0.47.0"
_WEIGHTS = {"dynamic": False, "num_bits": NVFP4.code_bits, "type": "float", "group_size": NVFP4.block_cols}

WEIGHTS: Mapping[str, ExportedWeight] = {
    NVFP4.name: ExportedWeight(
        (
            ExportedTensor("weight", "codes"),
            ExportedTensor("weight_scale", "scales"),
            ExportedTensor("weight_scale_2", "scales_2", declared=as_scalar),
        ),
        {"weights": _WEIGHTS, "targets": ["Linear"]},
        column_multiple=NVFP4.block_cols,
    )
}


def quantization_config(named: NamedModules) -> dict[str, Any]:
    """ModelOpt's `quantization_config`: one group for all linear layers, kept ones ignored."""
    return {
        "config_groups": {"group_0": dict(WEIGHTS[NVFP4.name].config)},
        "ignore": named.kept,
        "producer": {"name": "modelopt", "version": VERSION},
        "quant_algo": "W4A16_NVFP4",
        "quant_method": "modelopt",
    }


MODELOPT = ExportFormat("modelopt", WEIGHTS, quantization_config)
