"""`bench/values.py`: it finds values that are infinite, and figures that are not those of the values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import values
from quantload.kernels import statistics as st
from quantload.kernels.registry import OPERATIONS, kernel_set
from torch import Tensor

WEIGHTS = torch.randn(values.SHAPE, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture
def kernels() -> Any:
    return kernel_set("mxfp4", "cpu", dict.fromkeys(OPERATIONS[:4], "torch"))


def test_right_kernels_are_right_at_every_end_of_a_type(kernels: Any) -> None:
    assert all(values.is_right(kernels, source) for _, source in values.matrices(torch.bfloat16))


@pytest.mark.parametrize("spoilt", ["value", "noise", "count"])
def test_what_is_wrong_is_found(kernels: Any, spoilt: str) -> None:
    def quantize(source: Tensor, tensors: Any, measured: Tensor) -> int:
        kernels.quantize(source, tensors, measured)
        measured[st.NOISE] *= 2 if spoilt == "noise" else 1
        return int(spoilt == "count")

    def dequantize(tensors: Any, out: Tensor) -> None:
        kernels.dequantize(tensors, out)
        if spoilt == "value" and out.dtype == torch.bfloat16:
            out[0, 0] = torch.inf

    assert not values.is_right(
        SimpleNamespace(format=kernels.format, quantize=quantize, dequantize=dequantize), WEIGHTS
    )
