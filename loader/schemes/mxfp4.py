"""MXFP4: E2M1 codes, one E8M0 scale for 32 values along K, EVEN scale rule; the bytes AMD Quark exports."""

from __future__ import annotations

from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme


class QuarkMxfp4Linear(QuantizedLinearScheme):
    """`quark_mxfp4` for linear layers."""

    name = "quark_mxfp4"
    format_name = "mxfp4"


class QuarkMxfp4MoE(QuantizedMoEScheme):
    """`quark_mxfp4` for fused experts."""

    name = "quark_mxfp4"
    format_name = "mxfp4"
