"""The linear kernels: compiled for every GPU we name, and interpreted; what their launchers decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is on Linux only")

import torch
from gpu_targets import TARGETS, add_compiled, compile_for, interpret, interpreter_trouble
from matmul_kernels import MANY, check
from quantload.kernels.formats import FORMATS
from quantload.kernels.gpu import tiles as triton_tiles
from quantload.kernels.gpu.jit.mx_matmul import quantize_tokens_mx
from quantload.kernels.gpu.jit.scaled_matmul import quantize_tokens
from quantload.kernels.gpu.jit.tile_matmul import sum_parts
from quantload.kernels.gpu.linear import TritonLinear
from quantload.kernels.gpu.matmuls import gpu_matmuls, missing_nvfp4
from quantload.kernels.gpu.target import GpuTarget, gpu_target
from triton_ways import way_of

NATIVE_FP8 = {"gfx942": "fp8_block_fnuz", "gfx950": "fp8_block", "sm_90": "fp8_block", "sm_100": "fp8_block"}


@pytest.mark.parametrize("tokens", [1, MANY])
@pytest.mark.parametrize("target", TARGETS)
def test_mxfp4_weight_only(target: str, tokens: int) -> None:
    check("linear", "mxfp4", target, tokens, False)


@pytest.mark.parametrize("tokens", [1, MANY])
@pytest.mark.parametrize("target", ["gfx950", "sm_100"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_activations_too(name: str, target: str, tokens: int) -> None:
    check("linear", name, target, tokens, True)


@pytest.mark.parametrize("tokens", [1, MANY])
@pytest.mark.skipif(missing_nvfp4() is not None, reason=str(missing_nvfp4()))
def test_nvfp4_activations_too(tokens: int) -> None:
    check("linear", "nvfp4", "sm_100", tokens, True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["mxfp6_e2m3", "mxfp8", "nvfp4", "nl4", "int4_group128_f16", "fp8_channel", "int8_channel"]
)
def test_weight_only(name: str, target: str) -> None:
    check("linear", name, target, 1, False)


@pytest.mark.parametrize("target", NATIVE_FP8)
def test_fp8_activations_too(target: str) -> None:
    check("linear", NATIVE_FP8[target], target, 1, True)


@pytest.mark.parametrize("target", TARGETS)
def test_int8_activations_too(target: str) -> None:
    check("linear", "int8_channel", target, 1, True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name",
    [
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8",
        "nvfp4",
        "nl4",
        "int4_group16_bf16",
        "int4_group128_f16",
        "int8_group0_f32",
    ],
)
def test_every_other_tile_size_of_scales_along_k(name: str, target: str, dtype: torch.dtype) -> None:
    for tokens in (1, 32, 64, MANY):
        check("linear", name, target, tokens, False, dtype)
        if name in ("mxfp4", "mxfp8") and target in ("gfx950", "sm_100"):
            check("linear", name, target, tokens, True, dtype)
        if name == "nvfp4" and target == "sm_100" and missing_nvfp4() is None:
            check("linear", name, target, tokens, True, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fp8_channel", "fp8_tensor", "fp8_block", "int8_channel"])
def test_every_other_tile_size(name: str, target: str) -> None:
    native = name if name.startswith("int8") else NATIVE_FP8.get(target, "").replace("fp8_block", name)
    for tokens in (1, 32, 64, MANY):
        check("linear", name, target, tokens, False)
        if native:
            check("linear", native, target, tokens, True)


@pytest.mark.parametrize("target", TARGETS)
def test_activations_and_sums(target: str) -> None:
    kernels: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        *(
            (quantize_tokens_mx, {"x": "*bf16", "codes": "*u8", "scales": "*u8"}, {"CODE": code, "BT": 16, "BK": 256})
            for code in ("e2m1", "e4m3")
        ),
        (sum_parts, {"parts": "*fp32", "out": "*bf16", "bias": "*bf16"}, {"PARTS": 8, "HAS_BIAS": True, "BLOCK": 1024}),
        (
            quantize_tokens,
            {"x": "*bf16", "amax": "*fp32", "codes": "*u8", "scales": "*fp32"},
            {"RULE": "fp8_block", "FNUZ": target == "gfx942", "BK": 4096},
        ),
    ]
    for kernel, pointers, constants in kernels:
        given = {name: f"{kind}:16" for name, kind in pointers.items()}
        signature = given | {name: "i32:16" for name in kernel.arg_names if name not in {*pointers, *constants}}
        built = compile_for(kernel, signature, target, constants=constants, enable_fp_fusion=True)
        add_compiled(f"{kernel.__name__} {constants.get('RULE') or constants.get('CODE', '')}".strip(), built)
        assert built.spills == 0


@pytest.mark.skipif(interpreter_trouble() is not None, reason=interpreter_trouble() or "")
def test_arithmetic_in_the_interpreter() -> None:
    """But for those marked slow, which pytest's settings leave out."""
    results = interpret(Path(__file__).parent / "interpreted_linear.py", shares=[["--noconftest"]])
    assert len(results) > 50
    assert not [result for result in results if result.failure]


@pytest.mark.slow
@pytest.mark.skipif(interpreter_trouble() is not None, reason=interpreter_trouble() or "")
def test_more_arithmetic_in_the_interpreter() -> None:
    results = interpret(Path(__file__).parent / "interpreted_linear.py", shares=[["--noconftest", "-m", "slow"]])
    assert len(results) > 35
    assert not [result for result in results if result.failure]


def test_few_tokens_are_split_along_k_and_many_are_not() -> None:
    target = GpuTarget("sm_90", 132)
    tiles = triton_tiles.mx_tiles(target, 1, 4096, False)
    step = triton_tiles.split_of_k(target, programs=64, tiles=tiles, tokens=1, k=4096)
    assert step % tiles.columns == 0
    assert -(-4096 // step) == 4
    assert triton_tiles.split_of_k(target, programs=1000, tiles=tiles, tokens=1, k=4096) == 4096
    many = triton_tiles.mx_tiles(target, 512, 4096, False)
    assert triton_tiles.split_of_k(target, programs=4, tiles=many, tokens=512, k=4096) == 4096


@pytest.mark.parametrize("k", [32, 96, 100, 2880, 4096])
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 33, 64, 65, 10000])
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_are_what_the_kernels_can_take(target: str, tokens: int, k: int) -> None:
    for quantized in (False, True):
        for itemsize in (2, 4):
            mx = triton_tiles.mx_tiles(GpuTarget(target), tokens, k, quantized, itemsize)
            assert mx.columns % (128 if quantized else 32) == 0
            assert mx.rows == 128 or not (quantized and target == "sm_100")
            scaled = triton_tiles.scaled_tiles(GpuTarget(target), tokens, k, quantized, itemsize)
            assert 128 % scaled.rows == 128 % scaled.columns == 0
            decoded = triton_tiles.decoded_tiles(GpuTarget(target), tokens, k, itemsize)
            assert decoded.columns % 32 == 0
            for tiles in (mx, scaled, decoded):
                assert tiles.tokens >= min(tokens, 16)


def test_a_tensor_that_is_on_no_gpu_is_named() -> None:
    assert gpu_target(torch.device("cpu")) is None
    codes, scales = torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(8, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="tensor on cpu; move the whole layer"):
        TritonLinear(FORMATS["mxfp4"], way_of("mxfp4"))(torch.ones(2, 64), (codes, scales), None, 8, 64)
    with pytest.raises(ValueError, match="rows of codes must be contiguous"):
        TritonLinear(FORMATS["mxfp4"], way_of("mxfp4"))(
            torch.ones(2, 64), (codes.T.contiguous().T, scales), None, 8, 64
        )
    with pytest.raises(ValueError, match=r"x of shape \[T, 32\]"):
        TritonLinear(FORMATS["mxfp4"], way_of("mxfp4"))(torch.ones(2, 64), (codes, scales), None, 8, 32)
    for codes in (
        torch.zeros(8, 50, dtype=torch.uint8)[:, :48],
        torch.zeros(8 * 48 + 2, dtype=torch.uint8)[2:].view(8, 48),
    ):
        with pytest.raises(ValueError, match="must start at multiples of 4 bytes"):
            TritonLinear(FORMATS["mxfp6_e2m3"], way_of("mxfp6_e2m3"))(torch.ones(2, 64), (codes, scales), None, 8, 64)


CHOICES = {
    ("mxfp4", "gfx950"): "triton_w4a4",
    ("mxfp4", "sm_100"): "triton_w4a4",
    ("mxfp4", "sm_90"): "triton",
    ("nvfp4", "sm_100"): "triton" if missing_nvfp4() else "triton_w4a4",
    ("nvfp4", "sm_90"): "triton",
    ("nvfp4", "gfx950"): "triton",
    ("mxfp4", "gfx942"): "triton",
    ("nl4", "gfx950"): "triton",
    ("nl4", "sm_100"): "triton",
    ("mxfp8", "gfx950"): "triton_w8a8",
    ("mxfp8", "sm_100"): "triton_w8a8",
    ("mxfp8", "sm_90"): "triton",
    ("mxfp6_e2m3", "gfx950"): "triton",
    ("mxfp6_e3m2", "sm_80"): "triton",
    ("int4_group128_f16", "gfx950"): "triton",
    ("int8_group64_f32", "sm_90"): "triton",
    ("fp8_channel", "sm_80"): "triton",
    ("fp8_channel", "sm_90"): "scaled_mm",
    ("fp8_channel", "gfx950"): "triton_w8a8",
    ("fp8_channel", "gfx942"): "triton",
    ("fp8_channel_fnuz", "gfx942"): "triton_w8a8",
    ("fp8_block", "sm_90"): "triton_w8a8",
    ("int8_channel", "sm_80"): "triton",
}


@pytest.mark.parametrize(("name", "target"), CHOICES)
def test_the_best_kernel_of_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    for module in ("gpu.matmuls", "gpu.quantizers"):
        monkeypatch.setattr(f"quantload.kernels.{module}.gpu_target", lambda device: GpuTarget(target))
    kernels = gpu_matmuls("linear", FORMATS[name])
    able = [kernel.name for kernel in kernels if kernel.unavailable(torch.device("cuda")) is None]
    assert able[0] == CHOICES[name, target]
    for kernel in kernels:
        reason = kernel.unavailable(torch.device("cuda"))
        known = (target, "128 x 128", "not built for it", "3.8 and newer")
        assert reason is None or any(part in reason for part in known)


def test_what_no_gpu_kernel_can_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in gpu_matmuls("linear", FORMATS["mxfp4"]):
        if not torch.cuda.is_available():
            assert "no GPU" in (kernel.unavailable(torch.device("cuda")) or "")
        monkeypatch.setattr("quantload.kernels.gpu.quantizers.gpu_target", lambda device: GpuTarget("sm_75"))
        assert "needs sm_80 or newer" in (kernel.unavailable(torch.device("cuda")) or "")
        monkeypatch.undo()
    assert gpu_matmuls("quantize", FORMATS["mxfp4"]) == []
