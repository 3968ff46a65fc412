"""FP8 E4M3 with float32 scales: one a tensor, one an output row, or one a 128 x 128 block."""

from __future__ import annotations

from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme


class Fp8PerTensorLinear(QuantizedLinearScheme):
    """`fp8_per_tensor` for linear layers."""

    name = "fp8_per_tensor"
    format_name = "fp8_tensor"


class Fp8PerTensorMoE(QuantizedMoEScheme):
    """`fp8_per_tensor` for fused experts: one scale for each expert's gate, up and down."""

    name = "fp8_per_tensor"
    format_name = "fp8_tensor"


class Fp8PerChannelLinear(QuantizedLinearScheme):
    """`fp8_per_channel` (`ptpc_fp8`) for linear layers."""

    name = "fp8_per_channel"
    format_name = "fp8_channel"


class Fp8PerChannelMoE(QuantizedMoEScheme):
    """`fp8_per_channel` (`ptpc_fp8`) for fused experts."""

    name = "fp8_per_channel"
    format_name = "fp8_channel"


class Fp8PerBlockLinear(QuantizedLinearScheme):
    """`fp8_per_block` for linear layers."""

    name = "fp8_per_block"
    format_name = "fp8_block"


class Fp8PerBlockMoE(QuantizedMoEScheme):
    """`fp8_per_block` for fused experts; no block reaches from gate to up."""

    name = "fp8_per_block"
    format_name = "fp8_block"
