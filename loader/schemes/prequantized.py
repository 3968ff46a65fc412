"""Weights that stay as a quantized checkpoint stores them: any format that has kernels, nothing quantized here."""

from __future__ import annotations

from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme

NAME = "prequantized"


class PrequantizedLinear(QuantizedLinearScheme):
    """A linear layer in the format of its checkpoint."""

    name = NAME


class PrequantizedMoE(QuantizedMoEScheme):
    """Fused experts in the format of their checkpoint."""

    name = NAME
