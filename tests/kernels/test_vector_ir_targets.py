"""The vector IR compiles for processors that are not here, and to vector instructions."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir
from numba import types
from quantload.kernels.cpu.ir import dot as dot_ir
from quantload.kernels.cpu.ir import integer as integer_ir
from quantload.kernels.cpu.ir import integer_decode as integer_decode_ir
from quantload.kernels.cpu.ir import mx as mx_ir
from quantload.kernels.cpu.ir import mx_decode as mx_decode_ir
from quantload.kernels.cpu.ir import mxfp4_rows as mxfp4_rows_ir
from quantload.kernels.cpu.ir import mxfp4_table as mxfp4_table_ir
from quantload.kernels.cpu.ir import nl4 as nl4_ir
from quantload.kernels.cpu.ir import nl4_bytes as nl4_bytes_ir
from quantload.kernels.cpu.ir import nl4_decode as nl4_decode_ir
from quantload.kernels.cpu.ir import nvfp4_decode as nvfp4_decode_ir
from quantload.kernels.cpu.ir import scaled as scaled_ir
from quantload.kernels.cpu.ir import scaled_decode as scaled_decode_ir
from quantload.kernels.cpu.ir.vector import F32, I64

ADDRESS = types.int64
CONTEXT = SimpleNamespace(get_dummy_value=lambda: ir.Constant(I64, 0))
TARGETS = {
    "aarch64": ("aarch64-unknown-linux-gnu", "neoverse-n1", r"\bv\d+\.(4s|8h|16b)"),
    "avx512": ("x86_64-unknown-linux-gnu", "skylake-avx512", "[yz]mm"),
    "avx2": ("x86_64-unknown-linux-gnu", "haswell", "ymm"),
    "sse2": ("x86_64-unknown-linux-gnu", "x86-64", "xmm"),
}


def literal(value: object) -> SimpleNamespace:
    return SimpleNamespace(literal_value=value)


EMITTED: dict[str, tuple[Any, list[Any], list[Any], int]] = {
    "quantize_bf16_run": (mxfp4_table_ir.quantize_bf16_run, [ADDRESS] * 4, [literal(True), literal(False)], 1),
    **{
        f"quantize_{name}_{sums}": (mx_ir.quantize_run, [ADDRESS] * 5, [name, "default", kind, sums], 1)
        for name, kind, sums in (
            ("mxfp4", "f16", "f64"),
            ("mxfp6_e2m3", "bf16", "f32"),
            ("mxfp6_e3m2", "f32", "none"),
            ("mxfp8", "bf16", "none"),
        )
    },
    "quantize_nl4": (nl4_ir.quantize_run, [ADDRESS] * 5, ["bf16", "f32"], 1),
    "dequantize_nl4": (nl4_decode_ir.dequantize_blocks, [ADDRESS] * 2 + [types.float32, ADDRESS, ADDRESS], ["bf16"], 0),
    "candidate_errors": (mxfp4_rows_ir.candidate_errors, [ADDRESS] * 2, ["f16"], 1),
    "quantize_row": (mxfp4_rows_ir.quantize_row, [ADDRESS] * 5 + [types.float32], ["bf16", "f64"], 1),
    "quantize_fp8": (
        scaled_ir.quantize_tile,
        [ADDRESS] * 6 + [types.float32, ADDRESS],
        ["fp8_divide", "bf16", True],
        1,
    ),
    **{
        f"dequantize_{family}": (mx_decode_ir.dequantize_run, [ADDRESS] * 4, [family, kind], 0)
        for family, kind in (("mxfp4", "bf16"), ("mxfp6_e2m3", "f32"), ("mxfp6_e3m2", "bf16"), ("mxfp8", "bf16"))
    },
    "dequantize_fp8": (scaled_decode_ir.dequantize_tile, [ADDRESS] * 6 + [types.float32], ["fp8", "bf16"], 0),
    **{
        f"dot_{decoder}": (dot_ir.dot_rows, [ADDRESS] * 13, [2, 4, decoder], 0)
        for decoder in ("mxfp4_f32", "nl4_f32", "mxfp6_e2m3_f32", "mxfp6_e3m2_f32", "mxfp8_f32", "fp8_f32", "int8_f32")
    },
    **{
        f"dot_{decoder}": (dot_ir.dot_rows, [ADDRESS] * 13, [2, 4, decoder], 0)
        for decoder in ("uint4_f32_f32", "uint8_bf16_f32", "plain_bf16", "plain_f32")
    },
    "extremes": (integer_ir.group_extremes, [ADDRESS] * 5, [32, "bf16"], 0),
    "scales_of_extremes": (integer_ir.scales_of_extremes, [ADDRESS] * 3, [15, False, "bf16", "f16"], 0),
    "split_words": (integer_ir.split_words, [ADDRESS] * 3, ["f16"], 0),
    "quantize_int4": (integer_ir.quantize_groups, [ADDRESS] * 7, [32, 4, 0, "bf16", True], 1),
    "dequantize_int4": (integer_decode_ir.dequantize_group, [ADDRESS] * 4, [4, "bf16", "bf16"], 0),
    "quantize_int8": (scaled_ir.quantize_tile, [ADDRESS] * 6 + [types.float32, ADDRESS], ["int8", "bf16", True], 1),
}


def module_of(name: str) -> str:
    """LLVM IR of a function that holds nothing but what the intrinsic emits."""
    intrinsic, numbers, constants, last = EMITTED[name]
    literals = [value if isinstance(value, SimpleNamespace) else literal(value) for value in constants]
    _, codegen = intrinsic._defn(None, *numbers, *literals, *[ADDRESS] * last)
    module = ir.Module(name)
    arguments = [F32 if number is types.float32 else I64 for number in [*numbers, *[ADDRESS] * last]]
    function = ir.Function(module, ir.FunctionType(I64, arguments), name)
    b = ir.IRBuilder(function.append_basic_block())
    given = list(function.args)
    values = [*given[: len(numbers)], *[None] * len(literals), *given[len(numbers) :]]
    b.ret(codegen(CONTEXT, b, None, values))
    return str(module)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EMITTED)
def test_compiles_to_vector_instructions(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_bytes = nl4_bytes_ir, nl4_decode_ir, nvfp4_decode_ir
    for module in (*of_bytes, integer_decode_ir, integer_ir, mx_decode_ir, scaled_decode_ir, scaled_ir):
        monkeypatch.setattr(module, "has", lambda feature: False)  # what every processor can do
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, cpu, register = TARGETS[target]
    try:
        backend = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this LLVM has no {target} backend: {error}")
    machine = backend.create_target_machine(cpu=cpu, opt=2)
    module = llvm.parse_assembly(module_of(name))
    module.triple, module.data_layout = triple, str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    llvm.create_pass_builder(machine, options).getModulePassManager().run(
        module, llvm.create_pass_builder(machine, options)
    )
    assembly = machine.emit_assembly(module)
    assert re.search(register, assembly)
