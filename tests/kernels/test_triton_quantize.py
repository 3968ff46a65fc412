"""The Triton kernels without a matmul: bits in the interpreter, code for every target, nothing flushed or fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from quantload.kernels import statistics as st
from quantload.kernels.formats import FORMATS, Tensors

pytest.importorskip("triton", reason="Triton is on Linux only")

from gpu_kernel_table import TABLE
from gpu_targets import TARGETS, Compiled, add_compiled, compile_for, interpret, interpreter_trouble
from quantload.kernels.gpu import quantize as triton_quantize
from quantload.kernels.gpu import quantizers as gpu_quantize
from quantload.kernels.gpu.jit import integer, measure, mx, nl4, nvfp4, scaled
from tested_formats import TRITON, filled

HERE = Path(__file__).parent
POINTERS = MappingProxyType(
    {
        torch.int16: "*i16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.uint8: "*u8",
        torch.int8: "*i8",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
)
QUANTIZE = ("quantize_mx", "quantize_rows", "quantize_tiles", "quantize_integers", "quantize_nvfp4", "quantize_nl4")
OPTIONS = ("num_warps", "enable_fp_fusion")
EVERY = ("golden", "mx", "bits", "statistics", "pieces", "extremes")
"""The tests of every kernel: `test_kernel_*.py`."""
ALIKE = ("mxfp6_e3m2", "int4_group32_bf16", "int8_group64_f32", "int4fp8_channel")
"""Formats whose kernels differ from those of another in numbers only."""


@dataclass(frozen=True)
class Launch:
    """What a launcher would have started: a kernel, its grid, tensors and numbers, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    def compile(self, target: str) -> Compiled:
        """The specialisation that Triton would compile for these arguments."""
        signature, constants = {}, dict(self.constants)
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype] + (":16" if value.data_ptr() % 16 == 0 else "")
            elif value == 1:
                constants[name] = 1
            else:
                signature[name] = ("i64" if value >= 1 << 31 else "i32") + (":16" if value % 16 == 0 else "")
        return compile_for(self.kernel, signature, target, constants=constants, **self.options)


class Recorder:
    """Stands in for a kernel, and keeps what it was launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False))
            arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name.islower() and name not in OPTIONS}
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            assert {*arguments, *kwargs} == set(self.kernel.arg_names)
            self.launches.append(Launch(self.kernel, grid, arguments, kwargs, options))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels are not launched but listed here."""
    found: list[Launch] = []
    for module, names in (
        (mx, ("quantize_mx", "observe_mx", "scales_mx", "dequantize_mx")),
        (scaled, ("quantize_rows", "quantize_tiles", "observe_scaled", "scales_scaled", "dequantize_scaled")),
        (integer, ("quantize_integers", "observe_integers", "scales_integers", "dequantize_groups")),
        (nvfp4, ("quantize_nvfp4", "scales_nvfp4", "dequantize_nvfp4")),
        (nl4, ("quantize_nl4", "scales_nl4", "dequantize_nl4")),
        (measure, ("merge_partials",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


def outputs(name: str, rows: int, cols: int) -> Tensors:
    return filled(FORMATS[name], rows, cols, 0)


def compile_all(launches: list[Launch], operation: str, target: str, name: str) -> None:
    """Compile what was launched, and add it to the table; every kernel without spills and subnormals kept."""
    assert launches
    for launch in launches:
        built = launch.compile(target)
        assert built.spills == 0
        assert_keeps_subnormals(built)
        if launch.kernel.__name__ != "merge_partials":
            add_compiled(f"{operation} {name}", built, native_of(built))
    launches.clear()


def assert_keeps_subnormals(built: Compiled) -> None:
    if built.target.startswith("gfx"):
        assert built.find(r"float_denorm_mode_32 3"), built.kernel
    else:
        assert built.find(r"\.ftz") is None, built.kernel
        assert built.find(r"div\.(full|approx)\S+") is None, built.kernel
        assert built.find(r"fma\.rn\.f32") is None, built.kernel


def native_of(built: Compiled) -> str | None:
    """The widest loads there are: what a kernel that only moves bytes can have of native instructions."""
    return built.find(r"global_load_dwordx4|buffer_load_dwordx4|ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64")


def pairs(*quick: str) -> list[Any]:
    """Formats with the targets that store them: FNUZ is for gfx942 alone. All but the `quick` ones are slow.

    Formats that are not named compile the same kernel with other numbers.
    """
    return [
        pytest.param(name, target, id=f"{name}-{target}", marks=[] if name in quick else [pytest.mark.slow])
        for name in TRITON
        for target in TARGETS
        if target == "gfx942" or FORMATS[name].ocp is None
    ]


@pytest.mark.parametrize(("name", "target"), pairs(*(name for name in TRITON if name not in ALIKE)))
def test_quantize_compiles(launches: list[Launch], name: str, target: str) -> None:
    source, kernels = torch.zeros(64, 4096, dtype=torch.bfloat16), triton_quantize.triton_quantize(name)
    assert kernels.quantize(source, outputs(name, 64, 4096), st.new_statistics()) == 0
    made = [launch for launch in launches if launch.kernel.__name__ in ("merge_partials", *QUANTIZE)]
    assert len(made) == 2
    compile_all(made, "quantize", target, name)
    assert TABLE.rows[f"quantize {name}", target].native != "-"


@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=[] if target == "sm_90" else [pytest.mark.slow]) for target in TARGETS]
)
def test_the_search_for_scales_compiles(launches: list[Launch], target: str) -> None:
    source, name = torch.zeros(64, 4096, dtype=torch.bfloat16), "int4_group128_f16"
    kernels = triton_quantize.triton_quantize(name, "mse")
    assert kernels.quantize(source, outputs(name, 64, 4096), st.new_statistics()) == 0
    compile_all(launches, "quantize", target, f"{name} mse")


@pytest.mark.parametrize(
    ("name", "target"),
    pairs(
        *(
            "mxfp4",
            "nvfp4",
            "nl4",
            "mxfp6_e2m3",
            "mxfp8",
            "fp8_channel",
            "fp8_block",
            "fp8_channel_fnuz",
            "int8_channel",
        ),
        "int4_group128_f16",
    ),
)
def test_dequantize_compiles(launches: list[Launch], name: str, target: str) -> None:
    out = torch.zeros(64, 4096, dtype=torch.bfloat16)
    triton_quantize.triton_quantize(name).dequantize(outputs(name, 64, 4096), out)
    compile_all(launches, "dequantize", target, name)


@pytest.mark.parametrize(
    ("name", "target"), pairs("mxfp4", "nvfp4", "nl4", "fp8_tensor", "int8_channel", "fp8_block", "int4_group128_f16")
)
def test_observe_and_finish_compile(launches: list[Launch], name: str, target: str) -> None:
    source, kernels = torch.zeros(64, 4096, dtype=torch.bfloat16), triton_quantize.triton_quantize(name)
    amax = torch.zeros(FORMATS[name].amax_shape(64, 4096))
    assert kernels.observe(source, amax) == 0
    compile_all(launches, "observe", target, name)
    kernels.finish_scales(amax, outputs(name, 64, 4096)[1:])
    compile_all(launches, "finish_scales", target, name)


@pytest.mark.parametrize(
    ("name", "target", "dtype"), [("mxfp4", "sm_80", torch.float32), ("fp8_channel", "gfx950", torch.float16)], ids=str
)
def test_other_sources_odd_sizes_and_known_scales_compile(
    launches: list[Launch], name: str, target: str, dtype: torch.dtype
) -> None:
    source, kernels = torch.zeros(130, 333, dtype=dtype), triton_quantize.triton_quantize(name)
    made = outputs(name, 130, 333)
    assert kernels.quantize(source, made, st.new_statistics(), True) == 0
    kernels.dequantize(made, source)
    assert {launch.kernel.__name__ for launch in launches} > {"merge_partials"}
    for launch in launches:
        assert launch.compile(target).spills == 0


def test_a_piece_is_one_launch_and_one_for_statistics(launches: list[Launch]) -> None:
    """8 MiB of BF16; tensors or rows with one scale for scales, and rows with a zero point, are gone over twice."""
    source = torch.zeros(1024, 4096, dtype=torch.bfloat16)
    for name, fmt in {name: FORMATS[name] for name in TRITON}.items():
        kernels, made = triton_quantize.triton_quantize(name), outputs(name, 1024, 4096)
        observed = fmt.maxima.block_rows == 0 or len(fmt.scales) > 1
        twice = 2 if observed or (fmt.scale_words == 2 and fmt.block_cols == 0) else 0
        kernels.quantize(source, made)
        assert len(launches) == 1 + twice
        kernels.quantize(source, made, st.new_statistics())
        assert len(launches) == 3 + 2 * twice
        kernels.quantize(source, made, scales_known=True)
        assert len(launches) == 4 + 2 * twice
        assert min(launch.grid[0] for launch in launches if launch.kernel.__name__ in QUANTIZE) >= 256
        launches.clear()


def test_enqueueing_reads_nothing_back(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor on the host waits for the device; `enqueue_...` may not, `quantize` does once."""
    reads: list[str] = []

    def read(tensor: torch.Tensor) -> int:
        reads.append(str(tensor.dtype))
        return 0

    monkeypatch.setattr(torch.Tensor, "__int__", read)
    monkeypatch.setattr(torch.Tensor, "item", read)
    source, count = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    for name, fmt in {name: FORMATS[name] for name in TRITON}.items():
        kernels, made = triton_quantize.triton_quantize(name), outputs(name, 64, 256)
        kernels.enqueue_quantize(source, made, count, st.new_statistics())
        kernels.enqueue_observe(source, torch.zeros(fmt.amax_shape(64, 256)), count)
        assert reads == []
        kernels.quantize(source, made, st.new_statistics())
        assert reads == ["torch.int64"]
        reads.clear()


def files(*names: str) -> list[Path]:
    return [HERE / "interpreted_quantize.py", *(HERE / f"test_kernel_{name}.py" for name in names)]


HALVES = [["-k", half] for half in ("mx or int4", "not (mx or int4)")]
"""Arguments for two processes, with about half of the formats each."""


@pytest.mark.slow
@pytest.mark.skipif(interpreter_trouble() is not None, reason=interpreter_trouble() or "")
def test_interpreted_bits() -> None:
    """Tests of every kernel, on the Triton ones in the interpreter: those marked for it, which take seconds."""
    results = interpret(*files(*EVERY), shares=[["-m", "interpreted_quickly"]])
    check(results)
    labels = {label for result in results for label in result.kernels}
    assert {f"{op} {name}" for op in gpu_quantize.OPERATIONS for name in TRITON} <= labels


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(interpreter_trouble() is not None, reason=interpreter_trouble() or "")
def test_interpreted_bits_of_everything() -> None:
    results = interpret(*files(*EVERY), shares=HALVES, timeout=1500)
    check(results)
    assert len(results) > 900


def check(results: list[Any]) -> None:
    failed = [f"{result.test}:\n{result.failure}" for result in results if result.failure]
    assert not failed, "\n\n".join(failed)
    assert len(results) > 100
