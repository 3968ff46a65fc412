"""Products of several tokens with rows that a core has dequantized into its own cache, against float64."""

from __future__ import annotations

import pytest
import torch
from quantload.kernels.cpu import linear as cpu_linear
from quantload.kernels.formats import FORMATS, WeightFormat
from quantload.kernels.registry import kernel_set
from torch import Tensor

FORMAT_NAMES = ("mxfp4", "mxfp8", "fp8_block", "fp8_tensor", "int8_channel", "int4_group128_f16", "int8_group16_f32")
pytestmark = pytest.mark.skipif(
    cpu_linear.most_in_panels(FORMATS["mxfp4"], torch.bfloat16) == 0, reason="this processor has no products of BF16"
)


def quantized(name: str, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and the BF16 values they stand for."""
    kernels, fmt = kernel_set(name, "cpu"), FORMATS[name]
    source = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).bfloat16()
    codes = torch.empty(fmt.code_shape(rows, cols), dtype=fmt.code_dtype)
    scales, values = torch.empty(fmt.scale_shape(rows, cols), dtype=fmt.scale_dtype), torch.empty_like(source)
    kernels.quantize(source, (codes, scales))
    kernels.dequantize((codes, scales), values)
    return codes, scales, values


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(9, 70, 64), (33, 131, 2080), (128, 260, 4128)])
def test_products_are_those_of_bf16_weights(name: str, tokens: int, rows: int, cols: int) -> None:
    codes, scales, values = quantized(name, rows, cols)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    bias = torch.arange(rows).bfloat16()
    for given in (None, bias):
        got = cpu_linear._in_panels(FORMATS[name], x, (codes, scales), given, rows, cols)
        expected = x.double() @ values.double().T + (0 if given is None else given.double())
        assert got.shape == (tokens, rows)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=2.0**-8, atol=cols * 1e-6)


def test_columns_of_an_incomplete_block() -> None:
    codes, scales, values = quantized("mxfp4", 12, 2090)
    x = torch.randn(10, 2090, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = cpu_linear._in_panels(FORMATS["mxfp4"], x, (codes, scales), None, 12, 2090)
    torch.testing.assert_close(got.double(), x.double() @ values.double().T, rtol=2.0**-8, atol=2e-3)


def test_small_groups_and_more_tokens_than_registers_go_through_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []

    def noted(fmt: WeightFormat, x: Tensor, *rest: object) -> Tensor:
        taken.append((fmt.name, len(x)))
        return x

    monkeypatch.setattr(cpu_linear, "_in_panels", noted)
    for name, tokens in (("int4_group16_f16", 1), ("mxfp4", 8), ("mxfp4", 9), ("mxfp4", 4096)):
        codes, scales, _ = quantized(name, 32, 64)
        cpu_linear.linear(FORMATS[name], torch.ones(tokens, 64).bfloat16(), (codes, scales), None, 32, 64)
    assert taken == [("int4_group16_f16", 1), ("mxfp4", 9)]
