"""What compressed-tensors 0.20 writes: one of its formats for each weight format, in config groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference.nvfp4 import Nvfp4Codec
from .weights import ExportedConstant, ExportedTensor, ExportedWeight, ExportFormat, NamedModules, as_vector

VERSION = "0.20.0"
_INT4_IN_INT32 = 8
_OF_AN_EXPERT = "gate_proj", "up_proj", "down_proj"


def _arguments(bits: int, kind: str, strategy: str, *, dynamic: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "dynamic": dynamic, "group_size": None, "num_bits": bits, "strategy": strategy, "symmetric": True,
        "type": kind, **more,
    }  # fmt: skip


def _group(name: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "format": name, "input_activations": activations, "output_activations": None, "targets": ["Linear"],
        "weights": weights,
    }  # fmt: skip


def _mx(bits: int, *, dynamic: bool = False) -> dict[str, Any]:
    return _arguments(bits, "float", "group", dynamic=dynamic, group_size=32, scale_dtype="torch.uint8")


def _float(strategy: str, **more: Any) -> dict[str, Any]:
    return _arguments(8, "float", strategy, **more)


def _packed_zero_points(scales: Tensor) -> Tensor:
    """The zero points of [8n, 2G] scales and zero points as int32 [n, G]: row i of eight in nibble i."""
    points = scales[:, 1::2].to(torch.int32)
    points = torch.nn.functional.pad(points, (0, 0, 0, -len(points) % _INT4_IN_INT32))
    nibbles = points.view(-1, _INT4_IN_INT32, points.shape[1])
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).view(1, -1, 1)
    return (nibbles << shifts).sum(1, dtype=torch.int32)


_GLOBAL_SCALE = ExportedTensor("weight_global_scale", "scales_2", convert=Nvfp4Codec().multiplier, declared=as_vector)
_NVFP4 = _arguments(
    4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn", zp_dtype="torch.float8_e4m3fn"
)
_SCALE = ExportedTensor("weight_scale", "scales")
_PLAIN = (ExportedTensor("weight", "codes"), _SCALE)
_PLAIN_WHOLE = (ExportedTensor("weight", "codes"), ExportedTensor("weight_scale", "scales", declared=as_vector))
_PACKED = (ExportedTensor("weight_packed", "codes"), _SCALE)
_INT4 = (
    ExportedTensor("weight_packed", "codes", torch.int32),
    ExportedTensor("weight_scale", "scales", width=Fraction(1, 2), convert=lambda scales: scales[:, ::2]),
    ExportedTensor("weight_zero_point", "scales", torch.int32, _INT4_IN_INT32, convert=_packed_zero_points),
)
_SHAPE = ExportedConstant("weight_shape", lambda rows, columns: torch.tensor([rows, columns]))

WEIGHTS: Mapping[str, ExportedWeight] = {
    "mxfp4": ExportedWeight(
        _PACKED, _group("mxfp4-pack-quantized", _mx(4), _mx(4, dynamic=True)), column_multiple=32
    ),
    "mxfp6_e2m3": ExportedWeight(_PACKED, _group("mxfp6-pack-quantized", _mx(6), None), column_multiple=32),
    "mxfp8": ExportedWeight(_PLAIN, _group("mxfp8-quantized", _mx(8), None), column_multiple=32),
    # vLLM and SGLang refuse experts with one scale for a weight and one for every token.
    "fp8_tensor": ExportedWeight(
        _PLAIN_WHOLE, _group("float-quantized", _float("tensor"), _float("tensor", dynamic=True))
    ),
    "fp8_channel": ExportedWeight(
        _PLAIN, _group("float-quantized", _float("channel"), _float("token", dynamic=True))
    ),
    "fp8_block": ExportedWeight(
        _PLAIN,
        _group(
            "float-quantized",
            _float("block", block_structure=[128, 128]),
            _float("group", dynamic=True, group_size=128),
        ),
    ),
    "nvfp4": ExportedWeight(
        (*_PACKED, _GLOBAL_SCALE),
        _group("nvfp4-pack-quantized", _NVFP4, None),
        column_multiple=16,
    ),
    "int8_channel": ExportedWeight(
        _PLAIN,
        _group("int-quantized", _arguments(8, "int", "channel"), _arguments(8, "int", "token", dynamic=True)),
    ),
    "int4_group128_f16": ExportedWeight(
        _INT4,
        _group("pack-quantized", _arguments(4, "int", "group", group_size=128, symmetric=False), None),
        (_SHAPE,),
        column_multiple=128,
    ),
}  # fmt: skip


def quantization_config(named: NamedModules) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: one group for each format, the first for all other linears.

    Heads are named even where there is one group: vLLM's are no linear layers.
    """
    formats = list(dict.fromkeys(fmt.name for fmt in named.formats.values()))
    groups: dict[str, Any] = {}
    for number, name in enumerate(formats):
        group = dict(WEIGHTS[name].config)
        if len(formats) > 1:
            group["targets"] = _targets(module for module, fmt in named.formats.items() if fmt.name == name)
        else:
            group["targets"] = [*group["targets"], *named.heads]
        groups[f"group_{number}"] = group
    written = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": written.pop() if len(written) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": _targets(named.kept),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": VERSION,
    }


def _targets(modules: Iterable[str]) -> list[str]:
    return [target for module in modules for target in _target(module)]


def _target(module: str) -> list[str]:
    """A module's name, or a regular expression where a `*` stands for the number of an expert, or for all below it.

    The first expert is named as well: vLLM translates names into its own, not expressions, and asks for that one alone.
    """
    if "*" not in module:
        return [module]
    if module.endswith(".*"):
        below = module.removesuffix("*")
        return ["re:" + re.escape(below), *(f"{below}0.{name}" for name in _OF_AN_EXPERT)]
    return ["re:" + re.escape(module).replace(r"\*", "[0-9]+") + "$", module.replace("*", "0")]


# Asymmetric INT4 does not open in transformers with compressed-tensors 0.20, and MXFP6 not in vLLM 0.32.
COMPRESSED_TENSORS = ExportFormat(
    "compressed-tensors",
    WEIGHTS,
    quantization_config,
    frozenset({"mxfp4", "mxfp6_e2m3", "fp8_channel"}),
    {
        "transformers with compressed-tensors": frozenset(WEIGHTS) - {"int4_group128_f16"},
        "vLLM": frozenset(WEIGHTS) - {"mxfp6_e2m3"},
    },
)
