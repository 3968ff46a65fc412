"""linear equals torch's matmul with the dequantized weight."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from quantload.kernels.cpu import dequantize as cpu_dequantize
from quantload.kernels.cpu import few_tokens, processor, team
from quantload.kernels.cpu import linear as cpu_linear
from quantload.kernels.cpu.build import linear as linear_build
from quantload.kernels.formats import Tensors
from quantload.kernels.registry import KernelSet, kernel_set
from runners import Runner
from tested_formats import NUMBA_FORMATS, QUANTIZED, filled


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quantized(kernels: KernelSet, n_rows: int, k: int, size: float = 1.0) -> Tensors:
    weight = (torch.randn(n_rows, k, generator=torch.Generator().manual_seed(1)) * size).bfloat16()
    tensors = filled(kernels.format, n_rows, k, 0)
    assert kernels.quantize(weight, tensors) == 0
    return tensors


@cache
def small_weight(name: str, n_rows: int, k: int) -> Tensors:
    """Quantized once for all kernels and types of x: `test_kernel_bits.py` says that every kernel gives these bytes."""
    return quantized(kernel_set(name, "cpu"), n_rows, k, size=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "n_rows", "k", "bias_kind"),
    [
        (1, 96, 128, None),
        (3, 600, 100, "as x"),
        (8, 257, 96, torch.float32),
        (17, 1025, 320, torch.float32),
        (26, 40, 64, "as x"),
        (0, 40, 64, None),
    ],
    ids=str,
)
def test_equals_matmul_with_the_dequantized_weight(
    runner: Runner, dtype: torch.dtype, tokens: int, n_rows: int, k: int, bias_kind: str | torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    bias_dtype = dtype if bias_kind == "as x" else bias_kind
    bias = torch.randn(n_rows, generator=generator).to(bias_dtype) if bias_dtype is not None else None
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    tensors = small_weight(runner.format.name, n_rows, k)
    dequantized = runner.dequantize(tensors, (n_rows, k), dtype)
    want = F.linear(x.double(), dequantized.double(), None if bias is None else bias.double())
    there = tuple(tensor.to(runner.device) for tensor in tensors)
    given = None if bias is None else bias.to(runner.device)
    got = runner.kernels.linear(x.to(runner.device), there, given, n_rows, k).cpu()
    assert got.shape == (tokens, n_rows)
    assert got.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps  # one rounding, and a float32 sum
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 50])
def test_a_float32_bias_is_added_before_anything_is_rounded_to_the_type_of_x(runner: Runner, tokens: int) -> None:
    tensors = runner.quantize(torch.eye(64))
    x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    x[:, 0] = -256
    bias = torch.full((64,), 256.5)  # 256 in BF16
    on_device = tuple(t.to(runner.device) for t in tensors)
    got = runner.kernels.linear(x.to(runner.device), on_device, bias.to(runner.device), 64, 64).cpu()
    assert got.dtype == torch.bfloat16
    one = runner.dequantize(tensors, (64, 64))[0, 0]  # more or less, and kernels may round it to BF16
    wanted = [256.5 - 256 * float(value) for value in (one, one.bfloat16())]
    assert all(min(abs(value - want) for want in wanted) < 0.1 for value in got[:, 0].tolist())


def test_arguments_that_do_not_fit_are_named(runner: Runner) -> None:
    tensors = runner.quantize(torch.ones(8, 64))
    x = torch.ones(2, 64, device=runner.device)
    tensors = tuple(t.to(runner.device) for t in tensors)
    with pytest.raises(ValueError, match=r"x of shape \[T, 32\]"):
        runner.kernels.linear(x, tensors, None, 8, 32)
    with pytest.raises(ValueError, match="weight has codes"):
        runner.kernels.linear(x, tensors, None, 9, 64)
    with pytest.raises(ValueError, match="bias"):
        runner.kernels.linear(x, tensors, torch.ones(3, device=runner.device), 8, 64)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 30])
def test_the_number_of_threads_changes_nothing(fmt: str, tokens: int) -> None:
    kernels = kernel_set(fmt, "cpu")
    tensors = quantized(kernels, 1030, 512)  # enough weights for several threads
    x = torch.randn(tokens, 512).bfloat16()
    results = []
    for threads in (1, 2, 5):
        with torch_threads(threads):
            results.append(kernels.linear(x, tensors, None, 1030, 512))
    if tokens < 30:  # torch's own matmul of a tile may sum in another order
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_team_takes_every_row_once(threads: int) -> None:
    task = linear_build.dequantize_task()
    kernels = kernel_set("int8_channel", "cpu")
    tensors = quantized(kernels, 600, 512)
    want, got = torch.empty(600, 512), torch.full((600, 512), 77.0)
    kernels.dequantize(tensors, want)
    cpu_dequantize.dequantize(kernels.format, tensors, got, threads)
    assert torch.equal(got, want)
    assert task is linear_build.dequantize_task()


@pytest.mark.parametrize("fmt", sorted(set(QUANTIZED) & set(NUMBA_FORMATS) - {"mxfp4_rows"}))  # that is MXFP4's own
@pytest.mark.parametrize(("threads", "rows"), [(2, 1500), (3, 2048), (5, 700)])
def test_threads_start_where_scales_do(fmt: str, threads: int, rows: int) -> None:
    kernels = kernel_set(fmt, "cpu")
    tensors = quantized(kernels, rows, 1024)
    want, got = torch.empty(rows, 1024), torch.empty(rows, 1024)
    kernels.dequantize(tensors, want)
    cpu_dequantize.dequantize(kernels.format, tensors, got, threads)
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [3, 60])
def test_scratch_made_in_inference_mode_serves_outside_of_it(tokens: int) -> None:
    kernels = kernel_set("int8_channel", "cpu")
    tensors = quantized(kernels, 64, 96)
    x = torch.randn(tokens, 96).half()
    cpu_linear._reused.__dict__.clear()
    with torch.inference_mode():
        want = kernels.linear(x, tensors, None, 64, 96)
    assert torch.equal(kernels.linear(x, tensors, None, 64, 96), want)


def test_without_the_runtime_of_torch_one_thread_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(team, "_runtime", lambda: None)
    team._parallel.cache_clear()
    try:
        kernels = kernel_set("mxfp4", "cpu")
        tensors = quantized(kernels, 1030, 512)
        x = torch.randn(1, 512).bfloat16()
        with caplog.at_level("INFO", "quantload"), torch_threads(2):
            alone = kernels.linear(x, tensors, None, 1030, 512)
        assert "OpenMP runtime was not found" in caplog.text
    finally:
        team._parallel.cache_clear()
    with torch_threads(2):
        assert torch.equal(kernels.linear(x, tensors, None, 1030, 512), alone)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which libraries a process has loaded")
def test_the_runtime_of_torch_is_found() -> None:
    path = team._runtime()
    assert path is not None
    assert path.name.startswith(team.RUNTIMES)


OTHERS = {
    "uint4_f16_f32": "int4_group128_f16",
    "uint8_f32_f32": "int8_group64_f32",
    "mxfp4_f32": "mxfp4",
    "mxfp6_e2m3_f32": "mxfp6_e2m3",
    "mxfp6_e3m2_f32": "mxfp6_e3m2",
    "mxfp8_f32": "mxfp8",
    "mxfp8_f16c": "mxfp8",
    "nvfp4_f32": "nvfp4",
    "nl4_f32": "nl4",
    "fp8_f32": "fp8_block",
    "fp8_f16c": "fp8_block",
    "int8_f32": "int8_channel",
}


@pytest.mark.parametrize("decoder", OTHERS)
def test_decoders_of_other_processors(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoder.endswith("f16c") and not processor.has("f16c"):
        pytest.skip("this processor has no f16c")
    monkeypatch.setattr(few_tokens, "decoder_of", lambda fmt, dtype: decoder)
    kernels = kernel_set(OTHERS[decoder], "cpu")
    tensors = quantized(kernels, 261, 224)
    dequantized = torch.empty(261, 224)
    kernels.dequantize(tensors, dequantized)
    for tokens in (1, 3, 8):
        x = torch.randn(tokens, 224).bfloat16()
        want = F.linear(x.double(), dequantized.double()).bfloat16()
        torch.testing.assert_close(kernels.linear(x, tensors, None, 261, 224), want, rtol=0.008, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "code", "value", "kept"),
    [("mxfp4", 0x77, 6.0, 2), ("mxfp6_e2m3", 0xFF, -7.5, 4), ("mxfp6_e3m2", 0xFF, -28.0, 4), ("mxfp8", 0x7E, 448.0, 4)],
)
def test_weights_without_a_normal_bf16_count_as_zero_and_others_do_not(
    name: str, code: int, value: float, kept: int
) -> None:
    """`code` fills a byte, and `value` is what it means; the scales from `kept` on have no such weights."""
    kernels = kernel_set(name, "cpu")
    fmt = kernels.format
    codes = torch.full(fmt.code_shape(9, 32), code, dtype=torch.uint8).view(fmt.code_dtype)
    scales = torch.tensor([0, 1, 2, 3, 6, 64, 127, 200, 238], dtype=torch.uint8)[:, None]
    out = kernels.linear(torch.full((1, 32), 0.5), (codes, scales), None, 9, 32).double()
    exact = 0.5 * 32 * value * torch.pow(2.0, scales[:, 0].double() - 127)
    torch.testing.assert_close(out[0], exact, rtol=1e-6, atol=0)
    rounded = kernels.linear(torch.full((1, 32), 0.5).bfloat16(), (codes, scales), None, 9, 32).double()
    torch.testing.assert_close(rounded[0, kept:], exact[kept:], rtol=0.004, atol=0)
    assert bool((rounded[0, :kept].abs() <= exact[:kept].abs() * 1.004).all())
