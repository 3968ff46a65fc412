"""From a config and the tensors of a checkpoint to the weights it stores quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.headers import TensorEntry
from ...errors import UnsupportedCheckpointError
from ...kernels.formats import FORMATS, WeightFormat
from .awq import Awq
from .collect import collect
from .compressed_tensors import CompressedTensors
from .fields import CONFIG as FIELDS
from .fp8 import Fp8
from .gpt_oss import FORMATS_OF_BLOCKS, read_gpt_oss
from .gptq import Gptq
from .modelopt import ModelOpt
from .modules import Read
from .quantload import METHOD, read_quantload
from .quark import Quark
from .settings import Settings
from .weights import StoredCheckpoint

Collect = Callable[[Settings, Mapping[str, TensorEntry], Read, torch.dtype], StoredCheckpoint]


@dataclass(frozen=True)
class Reader:
    """What reads the checkpoints of a tool: the formats its weights can have, in the kinds of layers it stores."""

    tool: str
    collect: Collect
    formats: frozenset[WeightFormat]
    layers: tuple[str, ...] = ("linear", "experts")

    def holds(self, weight_format: WeightFormat, *, experts: bool) -> bool:
        """Whether weights of a format can be stored there: those of experts, or those of linear layers."""
        return weight_format in self.formats and ("experts" if experts else "linear") in self.layers


def _of(tool: str, family: type[Awq | CompressedTensors | Fp8 | Gptq | ModelOpt | Quark]) -> Reader:
    return Reader(tool, partial(collect, family), family.formats)


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "quark": _of("AMD Quark", Quark),
        "compressed-tensors": _of("llm-compressor and others that use compressed-tensors", CompressedTensors),
        "awq": _of("AutoAWQ in its GEMM layout", Awq),
        "gptq": _of("AutoGPTQ and GPTQModel", Gptq),
        "mxfp4": Reader("gpt-oss", read_gpt_oss, FORMATS_OF_BLOCKS, ("experts",)),
        **dict.fromkeys(("fp8", "mxfp8"), _of("DeepSeek and others like it", Fp8)),
        **dict.fromkeys(
            ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"), _of("NVIDIA ModelOpt", ModelOpt)
        ),
        METHOD: Reader("quantload", read_quantload, frozenset(FORMATS.values())),
    }
)
"""What reads a checkpoint, by its `quant_method`."""

_NOT_READ = {
    "bitsandbytes": "NF4, FP4 or LLM.int8 of bitsandbytes",
    "bitnet": "BitNet's ternary weights",
    "eetq": "EETQ's INT8",
    "fbgemm_fp8": "Meta's FP8 for FBGEMM",
    "hqq": "half-quadratic quantization",
    "auto-round": "Intel's AutoRound; its exports for GPTQ and AWQ are read",
    "quanto": "optimum-quanto's",
    "torchao": "torchao's",
}
"""Other tools by the names they have in `quant_method`."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_stored(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: Callable[[TensorEntry], Tensor]
) -> StoredCheckpoint:
    """The weights that a checkpoint stores quantized, by its `config.json`, and its other tensors.

    `read` fetches a small tensor, such as a second scale. Raises `UnsupportedCheckpointError` for a `quant_method` that
    is not read here, and `CheckpointError` for a config or a tensor that is unknown, inconsistent or missing.
    """
    settings = Settings(config, "").section("quantization_config")
    said = settings or Settings({}, "")
    if "quantization" in config and said.get("quant_method") is None:
        raise UnsupportedCheckpointError(
            "config.json: has a field quantization, as MLX writes it beside weights that MLX quantized, which are not "
            "read; load the original checkpoint, which quantload quantizes while it loads"
        )
    if settings is None:
        return StoredCheckpoint("none", {}, tensors)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UnsupportedCheckpointError(
            f"config.json: quantization_config.quant_method is {_named(method, settings)}; read are "
            f"{', '.join(map(repr, sorted(READERS)))}; load the original checkpoint, which "
            f"quantload quantizes while it loads"
        )
    settings.known(FIELDS[method])
    return READERS[method].collect(settings, tensors, read, _dtype(config))


def _named(method: Any, settings: Settings) -> str:
    """The method, and whose it is where the name alone does not say."""
    if method is None and (settings.get("load_in_4bit") is not None or settings.get("load_in_8bit") is not None):
        return "missing, beside fields of bitsandbytes"
    tool = _NOT_READ.get(method) if isinstance(method, str) else None
    return f"{method!r} ({tool})" if tool else repr(method)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights before they were quantized, as transformers finds it; BF16 if nothing says."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        for field in ("dtype", "torch_dtype"):
            name = str(values.get(field)).removeprefix("torch.")
            if name in _DTYPES:
                return _DTYPES[name]
    return torch.bfloat16
