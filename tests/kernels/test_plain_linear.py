"""Products of a few tokens with weights that are no codes: bit for bit those of torch operations in the same order."""

from __future__ import annotations

import pytest
import torch
from quantload.kernels.cpu import plain
from torch import Tensor

LANES = 16
DTYPES = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if plain.has_values(dtype)]


def random(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of at most 12 significant bits: their products are exact in float32, fused with the sum or not."""
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return values.half().to(dtype)


def in_order(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in the kernel's order: sixteen float32 sums of every sixteenth product, then halves onto halves."""
    products = x.float()[:, None, :] * weight.float()[None]
    sums = torch.zeros(*products.shape[:2], LANES)
    for part in products.split(LANES, dim=-1):
        sums = sums + part
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, dim=-1)
        sums = low + high
    out = sums[..., 0]
    return (out if bias is None else out + bias).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", range(1, plain.MOST_TOKENS + 1))
def test_bits_are_those_of_the_same_sums_in_torch(dtype: torch.dtype, tokens: int) -> None:
    for rows, cols in (1, 32), (5, 96), (70, 1056):
        x, weight = random(tokens, cols, dtype, 1), random(rows, cols, dtype)
        for bias in (None, random(1, rows, dtype, 2)[0]):
            assert torch.equal(plain.linear(x, weight, bias), in_order(x, weight, bias)), (rows, cols)


@pytest.mark.parametrize("tokens", [5, 8])
def test_sums_of_more_tokens_in_bf16_are_exact_where_float32_is(tokens: int) -> None:
    if plain.most_tokens(torch.bfloat16) < tokens:
        pytest.skip("this processor has no products of BF16")
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randint(-9, 10, shape, generator=generator).bfloat16() for shape in ((tokens, 1056), (70, 1056), (70,))
    )
    exact = x.double() @ weight.double().T
    assert torch.equal(plain.linear(x, weight, None), exact.float().bfloat16())
    assert torch.equal(plain.linear(x, weight, bias), (exact + bias.double()).float().bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_threads_share_and_those_left_over_are_all_there(dtype: torch.dtype) -> None:
    x, weight = random(3, 2048, dtype, 1), random(259, 2048, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = plain.linear(x, weight, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shared, in_order(x, weight, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormals_infinities_and_nan_go_through(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    weight = torch.zeros(4, 32, dtype=dtype)
    weight[0, 3], weight[1, 30], weight[2, 0], weight[3, 31] = tiny, float("inf"), float("nan"), -float("inf")
    x = torch.ones(1, 32, dtype=dtype)
    expected = torch.tensor([[tiny, float("inf"), float("nan"), -float("inf")]], dtype=dtype)
    torch.testing.assert_close(plain.linear(x, weight, None), expected, rtol=0, atol=0, equal_nan=True)


def test_a_view_of_activations_is_read_as_it_stands() -> None:
    x, weight = random(4, 128, torch.bfloat16, 1)[::2, 64:], random(6, 64, torch.bfloat16)
    assert torch.equal(plain.linear(x, weight, None), in_order(x, weight, None))


@pytest.mark.parametrize(
    ("weight", "serves"),
    [
        (torch.zeros(3, 64, dtype=torch.bfloat16), True),
        (torch.zeros(3, 64), True),
        (torch.zeros(64, 32).T, False),
        (torch.zeros(3, 128)[:, :64], False),
        (torch.zeros(3, 40), False),
        (torch.zeros(3, 64, dtype=torch.float64), False),
        (torch.zeros(0, 64), False),
        (torch.zeros(2, 3, 64), False),
    ],
)
def test_which_weights_are_served(weight: Tensor, serves: bool) -> None:
    assert plain.serves(weight) is serves
