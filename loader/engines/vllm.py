"""quantload in vLLM: `--quantization quark_mxfp4 --load-format quantload`, without a line of code."""

from __future__ import annotations

from vllm.model_executor import model_loader
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

from .beside_llvmlite import let_llvmlite_be_looked_at
from .names import LOAD_FORMAT
from .vllm_config import CLASSES
from .vllm_loader import QuantloadModelLoader


def register() -> None:
    """Make our names known to vLLM, in this process: cheap, and any number of times.

    A name that vLLM has itself stays vLLM's; ours is `quantload_` and that name, as for all schemes.
    """
    let_llvmlite_be_looked_at()
    for name, config in CLASSES.items():
        if name not in QUANTIZATION_METHODS:
            register_quantization_config(name)(config)
    if LOAD_FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(LOAD_FORMAT)(QuantloadModelLoader)
