"""The matmuls of a format through Triton, by the rows that the package has."""

from __future__ import annotations

from quantload.kernels.formats import FORMATS
from quantload.kernels.gpu.matmuls import gpu_matmuls


def way_of(name: str, is_quantized: bool = False) -> str:
    """The way of `ways.WAYS` in which weights of a format meet activations as they are, or quantized ones."""
    kernels = [kernel for kernel in gpu_matmuls("experts", FORMATS[name]) if kernel.attribute == "TritonExperts"]
    (way,) = {kernel.arguments for kernel in kernels if kernel.rounds_activations is is_quantized}
    return str(*way)
