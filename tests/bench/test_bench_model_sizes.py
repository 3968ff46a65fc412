"""Bits of a weight follow from the tensors of its format, scales included."""

from __future__ import annotations

import model_sizes
import pytest
from quantload.kernels.formats import FORMATS


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4 + 8 / 32), ("mxfp8", 8 + 8 / 32), ("fp8_channel", 8 + 32 / 4096),
        ("int4_group128_f16", 4 + 2 * 16 / 128), ("nvfp4", 4 + 8 / 16 + 32 / 4096**2),
    ],
)  # fmt: skip
def test_bits_are_those_of_codes_and_scales(name: str, bits: float) -> None:
    assert model_sizes.bits_of(FORMATS[name]) == pytest.approx(bits, rel=1e-9)


def test_a_scheme_of_sixteen_bits_takes_two_bytes_a_weight() -> None:
    last = model_sizes.render().splitlines()[-1]
    assert last.startswith("| `none` (BF16) | 16.00 | 1.9 | 14.9 |")
