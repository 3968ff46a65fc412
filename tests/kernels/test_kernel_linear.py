"""linear equals torch's matmul with the dequantized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "n_rows", "k"), [(1, 96, 128), (3, 600, 100), (17, 1025, 320), (0, 40, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_matmul_with_the_dequantized_weight(runner, dtype, tokens, n_rows, k, with_bias):
    generator = torch.Generator().manual_seed(tokens)
    weight = (torch.randn(n_rows, k, generator=generator) * 0.05).bfloat16()
    bias = torch.randn(n_rows, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    codes, scales = runner.quantize(weight)
    dequantized = runner.dequantize(codes, scales, (n_rows, k), dtype)
    want = F.linear(x.double(), dequantized.double(), None if bias is None else bias.double())
    on_device = [t if t is None else t.to(runner.device) for t in (x, codes, scales, bias)]
    got = runner.kernels.linear(*on_device, n_rows, k).cpu()
    assert got.shape == (tokens, n_rows)
    assert got.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps  # one rounding, and a float32 sum
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_arguments_that_do_not_fit_are_named(runner):
    codes, scales = runner.quantize(torch.ones(8, 64))
    x = torch.ones(2, 64, device=runner.device)
    codes, scales = codes.to(runner.device), scales.to(runner.device)
    with pytest.raises(ValueError, match=r"x of shape \[T, 32\]"):
        runner.kernels.linear(x, codes, scales, None, 8, 32)
    with pytest.raises(ValueError, match="weight has codes"):
        runner.kernels.linear(x, codes, scales, None, 9, 64)
    with pytest.raises(ValueError, match="bias"):
        runner.kernels.linear(x, codes, scales, torch.ones(3, device=runner.device), 8, 64)
