"""INT8 with one float32 scale an output row: amax / 127, round to nearest even, clamped to +-127."""

from __future__ import annotations

from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme


class Int8PerChannelLinear(QuantizedLinearScheme):
    """`int8_per_channel` for linear layers."""

    name = "int8_per_channel"
    format_name = "int8_channel"


class Int8PerChannelMoE(QuantizedMoEScheme):
    """`int8_per_channel` for fused experts."""

    name = "int8_per_channel"
    format_name = "int8_channel"


class ExpertsInt8(Int8PerChannelMoE):
    """The same under the name that leaves linear layers as they are, for messages and reports."""

    name = "experts_int8"
