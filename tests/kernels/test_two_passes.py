"""Maxima of parts, and codes under the scales made of them: the bytes of one call, at the ends of a type too."""

from __future__ import annotations

import pytest
import torch
from quantload.kernels.formats import FORMATS, RowMultiplied
from quantload.kernels.registry import candidates, kernel_set

CPU = torch.device("cpu")
PAIRS = [
    (name, kernel.name)
    for name, fmt in FORMATS.items()
    if not isinstance(fmt, RowMultiplied)
    for kernel, reason in candidates("quantize", name, CPU)
    if reason is None
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_the_largest_numbers_of_a_type_get_the_bytes_of_one_pass(name: str, kernel: str) -> None:
    """FP16 weights in the top binade had a larger MX scale in two passes, under which codes stood for infinity."""
    fmt, kernels = FORMATS[name], kernel_set(name, CPU, dict.fromkeys(("quantize", "observe", "finish_scales"), kernel))
    for dtype in DTYPES:
        source = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
        source[::3, ::40] = torch.finfo(dtype).max
        source[1::3, 5::40] = -torch.finfo(dtype).max * 0.9
        once, twice = fmt.empty(256, 256, CPU), fmt.empty(256, 256, CPU)
        assert not kernels.quantize(source, once)
        amax = torch.zeros(fmt.amax_shape(256, 256))
        for first in (0, 128):
            kernels.observe(source[first : first + 128], amax[slice(*fmt.maxima.rows(first, first + 128))])
        kernels.finish_scales(amax, twice[1:])
        assert not kernels.quantize(source, twice, scales_known=True)
        for one, other in zip(once, twice, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), dtype
