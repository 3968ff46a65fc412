"""MXFP6: E2M3 or E3M2 codes, one E8M0 scale for 32 values along K, EVEN scale rule; the bytes AMD Quark exports."""

from __future__ import annotations

from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme


class Mxfp6E2m3Linear(QuantizedLinearScheme):
    """`mxfp6_e2m3` for linear layers."""

    name = "mxfp6_e2m3"
    format_name = "mxfp6_e2m3"


class Mxfp6E2m3MoE(QuantizedMoEScheme):
    """`mxfp6_e2m3` for fused experts."""

    name = "mxfp6_e2m3"
    format_name = "mxfp6_e2m3"


class Mxfp6E3m2Linear(QuantizedLinearScheme):
    """`mxfp6_e3m2` for linear layers."""

    name = "mxfp6_e3m2"
    format_name = "mxfp6_e3m2"


class Mxfp6E3m2MoE(QuantizedMoEScheme):
    """`mxfp6_e3m2` for fused experts."""

    name = "mxfp6_e3m2"
    format_name = "mxfp6_e3m2"
