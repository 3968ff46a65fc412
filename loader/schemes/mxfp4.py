"""MXFP4: E2M1 codes, one E8M0 scale for 32 values along K, EVEN scale rule; with a multiplier for each row or without.

Without, the bytes are those that AMD Quark exports. With, rows keep more of what they were, and no other tool reads it.
"""

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


class Mxfp4RowsLinear(QuantizedLinearScheme):
    """`mxfp4_rows` for linear layers."""

    name = "mxfp4_rows"
    format_name = "mxfp4_rows"


class Mxfp4RowsMoE(QuantizedMoEScheme):
    """`mxfp4_rows` for fused experts."""

    name = "mxfp4_rows"
    format_name = "mxfp4_rows"
