"""gpt-oss's own MXFP4 layout: the experts of a layer in one tensor of blocks and one of scales, `quant_method` mxfp4.

What OpenAI published, and what transformers, vLLM and SGLang read for this architecture. Neither Quark's format nor
compressed-tensors' has a place for experts in one tensor: both tools take them apart into linear layers first, under
names that transformers does not know here. Linear layers cannot be quantized in this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels.formats import MXFP4
from .weights import ExportedTensor, ExportedWeight, ExportFormat, NamedModules, Shape

_BLOCK_BYTES = MXFP4.block_cols // 2


def as_blocks(shape: Shape) -> Shape:
    """[experts, rows, columns / 2] bytes declared as [experts, rows, columns / 32, 16]."""
    return (*shape[:-1], shape[-1] // _BLOCK_BYTES, _BLOCK_BYTES)


_PARTS = (ExportedTensor("_blocks", "codes", declared=as_blocks), ExportedTensor("_scales", "scales"))
WEIGHTS: Mapping[str, ExportedWeight] = {
    MXFP4.name: ExportedWeight(_PARTS, {}, column_multiple=MXFP4.block_cols, fused=True)
}


def quantization_config(named: NamedModules) -> dict[str, Any]:
    """The method, and the linear layers that are no part of it."""
    return {"modules_to_not_convert": named.kept, "quant_method": "mxfp4"}


GPT_OSS = ExportFormat("mxfp4", WEIGHTS, quantization_config, frozenset(WEIGHTS), {"transformers": frozenset(WEIGHTS)})
