"""The element types of the MX formats as data, without torch: processes that only compile kernels need them too."""

from __future__ import annotations

from dataclasses import dataclass

from .scale_rules import TOP_EXPONENT


@dataclass(frozen=True)
class MxElement:
    """A sign, exponent and mantissa code without infinities, and the scale rule that goes with it.

    `name` is that of the format. The scale byte is clamp(E - emax + inc, 0, 254) from exponent E and significand m of
    a block's float32 amax; inc is m >= `threshold`. For weights of a kind there is a `last_byte` below 254.
    """

    name: str
    code_bits: int
    mantissa_bits: int
    bias: int
    emax: int
    largest: float
    threshold: int

    def last_byte(self, kind: str) -> int:
        """The largest scale byte of weights of a kind: under the next one, codes would be infinite in their type.

        The rule asks for more only in the topmost binade, where the largest code is at least 3/4 of every weight.
        """
        return 127 + TOP_EXPONENT[kind] - self.emax

    def largest_amax(self, kind: str) -> float:
        """The largest maximum of a block that the rule answers with the last byte: those above it saturate."""
        return 2.0 ** TOP_EXPONENT[kind] * (1.0 + (self.threshold - 1) * 2.0**-23)


E2M1 = MxElement("mxfp4", 4, 1, 1, 2, 6.0, 0x600000)
E2M3 = MxElement("mxfp6_e2m3", 6, 3, 1, 2, 7.5, 0x780000)
E3M2 = MxElement("mxfp6_e3m2", 6, 2, 3, 4, 28.0, 0x700000)
E4M3 = MxElement("mxfp8", 8, 3, 7, 8, 448.0, 0x600001)
"""RCEIL: the next power of two from the first float32 above 448 = 1.75 * 2^8 on."""

LARGEST_MULTIPLIER = (2.0 - 2.0**-7) / (E2M1.largest * 2.0**-E2M1.emax)
"""Times this the largest code of MXFP4 under the last byte is still finite in BF16, and in FP16 as well."""

ELEMENTS = {element.name: element for element in (E2M1, E2M3, E3M2, E4M3)}


def code_values(element: MxElement) -> tuple[float, ...]:
    """The values of all codes without a sign, in order (all finite: neither MXFP4 nor MXFP6 has NaN)."""
    step = 1 << element.mantissa_bits
    values = []
    for code in range(1 << (element.code_bits - 1)):
        exponent, mantissa = divmod(code, step)
        fraction = mantissa + (step if exponent else 0)
        values.append(fraction * 2.0 ** (max(exponent, 1) - element.bias - element.mantissa_bits))
    return tuple(values)


def last_byte_of_row(multiplier: float, kind: str) -> int:
    """`MxElement.last_byte` in a row of `mxfp4_rows` with a multiplier."""
    return E2M1.last_byte(kind) - (multiplier > LARGEST_MULTIPLIER)
