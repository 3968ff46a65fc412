"""What AMD Quark 0.13 exports in its Hugging Face format: `weight` and `weight_scale`, described in Quark's own terms.

Quark quantizes a last block along K that is not full as if zeros followed, and stores its scale and only the codes
that are there, so K needs to be a multiple of the codes that are packed together and no more. Its own import expects
whole blocks.

Codes and scales are those of an online load. Quark writes scale byte 1 for a block of zeros and no negative zeros where
an online load has byte 0 and keeps the sign. They stand for the same values; they are written as they are loaded, so
that a checkpoint reads back to the very bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.formats import MXFP4, MXFP6_E2M3, MXFP6_E3M2, WeightFormat
from .weights import ExportedConstant, ExportedTensor, ExportedWeight, ExportFormat, NamedModules, as_scalar, as_vector

VERSION = "0.13"

_TENSOR: dict[str, Any] = {
    "block_size": None, "ch_axis": None, "dtype": None, "enable_buffer_reuse": False, "group_size": None,
    "is_dynamic": False, "is_scale_quant": False, "max_input_numel": 4194304, "mx_element_dtype": None,
    "observer_cls": None, "qscheme": None, "round_method": "half_even", "scale_calculation_mode": None,
    "scale_format": None, "scale_type": "float", "symmetric": True, "zero_point_type": "int32",
}  # fmt: skip


def _layer(weight: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "bias": None, "input_tensors": {**_TENSOR, **inputs, "is_dynamic": True}, "output_tensors": None,
        "target_device": None, "weight": {**_TENSOR, **weight},
    }  # fmt: skip


def _mx(dtype: str, fmt: WeightFormat) -> ExportedWeight:
    described = {
        "dtype": dtype, "ch_axis": -1, "group_size": 32, "observer_cls": "PerBlockMXObserver", "qscheme": "per_group",
        "scale_calculation_mode": "even", "scale_format": "e8m0", "symmetric": None,
    }  # fmt: skip
    return ExportedWeight(_WEIGHT, _layer(described, described), column_multiple=fmt.packed)


def _channel(dtype: str) -> dict[str, Any]:
    described = {"dtype": dtype, "observer_cls": "PerChannelMinMaxObserver", "qscheme": "per_channel"}
    return _layer({**described, "ch_axis": 0}, {**described, "ch_axis": 1})


_CODES = ExportedTensor("weight", "codes", filled=False)
_WEIGHT = (_CODES, ExportedTensor("weight_scale", "scales"))
_WEIGHT_BY_ROW = (_CODES, ExportedTensor("weight_scale", "scales", declared=as_vector))
_WEIGHT_WHOLE = (_CODES, ExportedTensor("weight_scale", "scales", declared=as_scalar))
_PER_TENSOR = {"dtype": "fp8_e4m3", "observer_cls": "PerTensorMinMaxObserver", "qscheme": "per_tensor"}
_ZEROS_BY_ROW = ExportedConstant("weight_zero_point", lambda rows, _: torch.zeros(rows, dtype=torch.int8))

# Quark 0.13 has no kernel that reads MXFP8, nor one for blocks of FP8 that do not fill 128 x 128 elements.
WEIGHTS: Mapping[str, ExportedWeight] = {
    "mxfp4": _mx("fp4", MXFP4),
    "mxfp6_e2m3": _mx("fp6_e2m3", MXFP6_E2M3),
    "mxfp6_e3m2": _mx("fp6_e3m2", MXFP6_E3M2),
    "fp8_tensor": ExportedWeight(_WEIGHT_WHOLE, _layer(_PER_TENSOR, _PER_TENSOR)),
    "fp8_channel": ExportedWeight(_WEIGHT_BY_ROW, _channel("fp8_e4m3")),
    "int8_channel": ExportedWeight(_WEIGHT_BY_ROW, _channel("int8"), (_ZEROS_BY_ROW,)),
}


def quantization_config(named: NamedModules) -> dict[str, Any]:
    """Quark's `quantization_config`: the most frequent format for all, others by module, kept modules excluded."""
    most = Counter(named.formats.values()).most_common(1)[0][0]
    others = {_pattern(name): WEIGHTS[fmt.name].config for name, fmt in named.formats.items() if fmt is not most}
    return {
        "algo_config": None,
        "exclude": named.kept,
        "export": {
            "kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": WEIGHTS[most.name].config,
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": {},
        "layer_quant_config": others,
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": VERSION,
    }  # fmt: skip


def _pattern(module: str) -> str:
    """A module's name, or one glob for all experts of a layer, which vLLM looks up by the name they share."""
    experts, separator, _ = module.partition(".*.")
    return f"{experts}*" if separator else module


_ALL = frozenset(WEIGHTS)
QUARK = ExportFormat("quark", WEIGHTS, quantization_config, readers={"transformers with AMD Quark": _ALL, "vLLM": _ALL})
