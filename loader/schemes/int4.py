"""INT4: asymmetric in groups of 128 as AutoAWQ has them, and symmetric rows beside FP8 as SGLang has experts."""

from __future__ import annotations

from .fp8 import Fp8PerTensorLinear
from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme


class Int4PerGroupLinear(QuantizedLinearScheme):
    """`int4_per_group` for linear layers."""

    name = "int4_per_group"
    format_name = "int4_group128_f16"


class Int4PerGroupMoE(QuantizedMoEScheme):
    """`int4_per_group` for fused experts."""

    name = "int4_per_group"
    format_name = "int4_group128_f16"


class QuarkInt4Fp8Linear(Fp8PerTensorLinear):
    """`quark_int4fp8_moe` for linear layers: FP8 with one scale, which is what SGLang makes of them."""

    name = "quark_int4fp8_moe"


class QuarkInt4Fp8MoE(QuantizedMoEScheme):
    """`quark_int4fp8_moe` for fused experts: the codes of SGLang, and its INT4 scale times its FP8 scale."""

    name = "quark_int4fp8_moe"
    format_name = "int4fp8_channel"
