"""Products with codes of which several blocks are decoded together: each in its place, under its scale."""

from __future__ import annotations

import pytest
import torch
from quantload.kernels.cpu import few_tokens, processor
from quantload.kernels.cpu.ir.decoders import BLOCK, DECODERS, order_of
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import kernel_set
from torch import Tensor

NAMES = ("mxfp4", "nvfp4", "nl4", "int4_group128_f16")
OF_BYTES = ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "fp8_channel", "fp8_block")
pytestmark = pytest.mark.skipif(
    not few_tokens.decoder_of(FORMATS["mxfp4"], torch.bfloat16).endswith("_bf16"),
    reason="this processor has no products of BF16",
)


def weight(name: str, rows: int, cols: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The tensors of a weight whose blocks differ in size, and the float32 values they stand for."""
    kernels = kernel_set(name, "cpu")
    generator = torch.Generator().manual_seed(cols)
    sizes = torch.exp2(torch.randint(-6, 6, (rows, -(-cols // 16)), generator=generator).float())
    source = torch.randn(rows, cols, generator=generator) * sizes.repeat_interleave(16, 1)[:, :cols]
    tensors, values = kernels.format.empty(rows, cols), torch.empty(rows, cols)
    assert kernels.quantize(source.bfloat16(), tensors) == 0
    kernels.dequantize(tensors, values)
    return tensors, values


@pytest.mark.parametrize("name", [*NAMES, *OF_BYTES])
def test_the_best_decoder_takes_several_blocks(name: str) -> None:
    if name in OF_BYTES and not processor.has("avx512vbmi"):
        pytest.skip("this processor looks up no bytes")
    assert order_of(few_tokens.decoder_of(FORMATS[name], torch.bfloat16)) is not None


def test_segments_are_whole_numbers_of_what_is_taken_together() -> None:
    for fmt in FORMATS.values():
        if fmt.decoder:
            decoder = DECODERS[few_tokens.decoder_of(fmt, torch.bfloat16)]
            together = BLOCK * decoder.wide.blocks if decoder.wide and not decoder.block_scales else 1
            assert fmt.block_cols % together == 0, fmt.name


@pytest.mark.parametrize("name", [*NAMES, *OF_BYTES])
@pytest.mark.parametrize("cols", [128, 416])
def test_a_product_with_the_identity_gives_the_values(name: str, cols: int) -> None:
    tensors, values = weight(name, 6, cols)
    linear = kernel_set(name, "cpu").linear
    rows = [linear(part, tensors, None, 6, cols) for part in torch.eye(cols).bfloat16().split(1)]
    assert torch.equal(torch.cat(rows), values.T.bfloat16())


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_sums_of_small_whole_numbers_are_exact(tokens: int) -> None:
    kernels, generator = kernel_set("mxfp4", "cpu"), torch.Generator().manual_seed(tokens)
    codes = torch.randint(0, 256, (70, 272), generator=generator, dtype=torch.uint8)
    scales = torch.randint(125, 130, (70, 17), generator=generator, dtype=torch.uint8)
    values = torch.empty(70, 544)
    kernels.dequantize((codes, scales), values)
    x = torch.randint(-4, 5, (tokens, 544), generator=generator).bfloat16()
    exact = x.double() @ values.double().T
    assert torch.equal(kernels.linear(x, (codes, scales), torch.zeros(70), 70, 544), exact.float().bfloat16())
    assert torch.equal(kernels.linear(x, (codes, scales), None, 70, 544), exact.float().bfloat16())


def test_the_smallest_and_the_largest_scales_count() -> None:
    codes = torch.full((4, 64), 0x77, dtype=torch.uint8)  # 6 everywhere
    scales = torch.tensor([0, 1, 127, 240], dtype=torch.uint8)[:, None].repeat(1, 4)
    out = kernel_set("mxfp4", "cpu").linear(torch.ones(1, 128).bfloat16(), (codes, scales), None, 4, 128)
    assert out[0].tolist() == [768 * 2.0 ** (int(byte) - 127) for byte in scales[:, 0]]


@pytest.mark.parametrize("name", ["nvfp4", "nl4"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_scales_of_all_blocks_of_a_row_count_once(name: str, with_bias: bool) -> None:
    tensors, _ = weight(name, 70, 160)
    tensors[2].copy_(torch.exp2(torch.arange(tensors[2].numel()).remainder(5).float()).view_as(tensors[2]))
    values = torch.empty(70, 160)
    kernels = kernel_set(name, "cpu")
    kernels.dequantize(tensors, values)
    bias = torch.arange(70.0) if with_bias else None
    x = torch.eye(160)[:5].bfloat16()
    wanted = values.T[:5].double() + (0 if bias is None else bias.double())
    assert torch.equal(kernels.linear(x, tensors, bias, 70, 160), wanted.float().bfloat16())


def test_a_nan_among_scales_is_one_in_the_sums() -> None:
    tensors, _ = weight("nvfp4", 6, 128)
    tensors[1].view(torch.uint8)[2, 3] = 0x7F
    out = kernel_set("nvfp4", "cpu").linear(torch.ones(1, 128).bfloat16(), tensors, None, 6, 128)
    assert out.isnan().tolist() == [[row == 2 for row in range(6)]]


def test_a_place_for_activations_is_used_again_and_grows() -> None:
    small = few_tokens._place(64)
    assert few_tokens._place(32) == small
    assert few_tokens._place(1 << 16) == few_tokens._place(1 << 10)
    assert small % 64 == few_tokens._place(1 << 16) % 64 == 0
