"""MXFP8: E4M3 codes, one E8M0 scale for 32 values along K, RCEIL scale rule; the bytes torchao makes."""

from __future__ import annotations

from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme


class Mxfp8Linear(QuantizedLinearScheme):
    """`mxfp8` for linear layers."""

    name = "mxfp8"
    format_name = "mxfp8"


class Mxfp8MoE(QuantizedMoEScheme):
    """`mxfp8` for fused experts."""

    name = "mxfp8"
    format_name = "mxfp8"
