"""What is known of a stored weight without reading it."""

from __future__ import annotations

import pytest
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.kernels.formats import FORMATS
from quantload.schemes.stored.weights import StoredTensor, StoredWeight


@pytest.mark.parametrize(
    ("name", "largest_code"),
    [("fp8_channel", 448), ("int8_channel", 128), ("int4_group32_f32", 15), ("int8_group32_f32", 255), ("nvfp4", 6)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_largest_scale_makes_no_code_infinite(name: str, largest_code: int, dtype: torch.dtype) -> None:
    """The code furthest from zero, or from its zero point; -128 of INT8, which other tools write."""
    codes = StoredTensor("codes", TensorEntry("w", FORMATS[name].code_dtype, (4, 32), 0, 0, 128))
    weight = StoredWeight("w", FORMATS[name], None, 4, 32, dtype, (codes,))
    assert weight.largest_scale == torch.finfo(dtype).max / largest_code
