"""NVFP4 in Triton: in the interpreter, and what is compiled that the tests of all formats do not compile."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is on Linux only")

from gpu_targets import TARGETS, add_compiled, compile_for, interpret, interpreter_trouble
from quantload.kernels.gpu.jit.nvfp4 import quantize_nvfp4
from quantload.kernels.gpu.jit.nvfp4_matmul import quantize_tokens_nvfp4
from quantload.kernels.nvfp4_scales import spread


@pytest.mark.skipif(interpreter_trouble() is not None, reason=interpreter_trouble() or "")
def test_arithmetic_in_the_interpreter() -> None:
    """But for those marked slow, which pytest's settings leave out."""
    results = interpret(Path(__file__).parent / "interpreted_nvfp4.py", shares=[["--noconftest"]])
    assert len(results) > 30
    assert not [result for result in results if result.failure]


@pytest.mark.slow
@pytest.mark.skipif(interpreter_trouble() is not None, reason=interpreter_trouble() or "")
def test_more_arithmetic_in_the_interpreter() -> None:
    results = interpret(Path(__file__).parent / "interpreted_nvfp4.py", shares=[["--noconftest", "-m", "slow"]])
    assert len(results) > 5
    assert not [result for result in results if result.failure]


@pytest.mark.parametrize("target", TARGETS)
def test_four_over_six_compiles(target: str) -> None:
    pointers = {
        "source": "*i16",
        "codes": "*u8",
        "scales": "*u8",
        "scale_of_tensor": "*fp32",
        "partials": "*fp64",
        "nonfinite": "*i64",
    }
    constants = {"SPREAD": spread("mse"), "MSE": True, "MEASURE": True, "R": 4, "B": 64}
    numbers = {name: "i32:16" for name in quantize_nvfp4.arg_names if name not in {*pointers, *constants}}
    signature = {name: f"{kind}:16" for name, kind in pointers.items()} | numbers
    built = compile_for(quantize_nvfp4, signature, target, constants=constants, enable_fp_fusion=False)
    add_compiled("quantize nvfp4 mse", built)
    assert built.spills == 0


def test_activations_compile() -> None:
    pointers = {"x": "*bf16", "amax": "*fp32", "codes": "*u8", "scales": "*u8", "token_scales": "*fp32"}
    constants = {"SPREAD": spread("default"), "BT": 16, "BK": 256}
    numbers = {name: "i32:16" for name in quantize_tokens_nvfp4.arg_names if name not in {*pointers, *constants}}
    signature = {name: f"{kind}:16" for name, kind in pointers.items()} | numbers
    built = compile_for(quantize_tokens_nvfp4, signature, "sm_100", constants=constants, enable_fp_fusion=False)
    add_compiled("quantize_tokens_nvfp4", built)
    assert built.spills == 0
