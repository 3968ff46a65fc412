"""Compiles Triton kernels for GPUs that are not here, reads what they need, and keeps the table of all of them.

`compile_for` gives the assembly, registers, spills and shared memory of one specialisation for one target;
`add_compiled` puts them in the table that is printed at the end of the run; `interpret` runs files of tests under
Triton's interpreter.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton
from gpu_kernel_table import TABLE, Row, Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.runtime import interpreter

TARGETS: Mapping[str, GPUTarget] = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: `asm` is amdgcn or PTX; sizes are per thread (spills, stack) or per program."""

    kernel: str
    target: str
    asm: str
    registers: int
    spills: int
    """Spilled registers (AMD: vector and scalar) or bytes of spill stores and loads (NVIDIA)."""
    stack_bytes: int
    shared_bytes: int

    def find(self, pattern: str) -> str | None:
        """The first instruction that matches a regular expression, or None."""
        match = re.search(pattern, self.asm)
        return match.group(0) if match else None


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    target: str,
    *,
    constants: Mapping[str, Any] | None = None,
    num_warps: int = 4,
    num_stages: int | None = None,
    **options: Any,
) -> Compiled:
    """Compile one specialisation of a `@triton.jit` function; whatever the compiler raises comes through.

    `signature` gives the Triton type of every argument that is no constexpr: "*bf16", "i32", ... A suffix ":16" says
    that the value (or address) is a multiple of 16, which is what a launch finds out by itself. `constants` are the
    constexpr arguments. `options` go to the backend: `enable_fp_fusion=False`, `waves_per_eu=2`, ...
    """
    gpu = TARGETS[target]
    given = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    ordered = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    unknown = {*signature, *(constants or ())} - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__} takes {kernel.arg_names}, not {sorted(unknown)}")
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16")
    }
    source = ASTSource(kernel, ordered, dict(constants or {}), attributes)
    settings = {"num_warps": num_warps, **({} if num_stages is None else {"num_stages": num_stages}), **options}
    built = triton.compile(source, target=gpu, options=settings)
    shared = int(built.metadata.shared)
    if gpu.backend == "hip":
        asm = built.asm["amdgcn"]
        counts = {name: int(n) for name, n in re.findall(r"\.(\w+(?:_count|_fixed_size)):\s+(\d+)", asm)}
        return Compiled(
            kernel.__name__,
            target,
            asm,
            counts["vgpr_count"],
            counts["vgpr_spill_count"] + counts["sgpr_spill_count"],
            counts["private_segment_fixed_size"],
            shared,
        )
    registers, stack = _resources(built.asm["cubin"])
    spills = _ptx_spills(built.asm["ptx"], gpu, settings) if stack else 0
    return Compiled(kernel.__name__, target, built.asm["ptx"], registers, spills, stack, shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the kernel in a cubin; without a stack there can be no spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", listed)
    if not found:
        raise ValueError(f"no resources in the output of {command[0]}: {listed!r}")
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def _ptx_spills(ptx: str, gpu: GPUTarget, settings: Mapping[str, Any]) -> int:
    """Bytes of spill stores and loads that ptxas reports."""
    fused = [] if settings.get("enable_fp_fusion", True) else ["--fmad=false"]
    arch = sm_arch_from_capability(gpu.arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(gpu.arch).path, "-v", *fused, f"--gpu-name={arch}", str(path), "-o", f"{path}.o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not found:
        raise ValueError(f"ptxas said nothing of spills: {log!r}")
    return sum(int(stores) + int(loads) for stores, loads in found)


def add_compiled(label: str, compiled: Compiled, native: str | None = None, table: Table = TABLE) -> Compiled:
    """Record a compiled kernel; `native` is the native instruction that was looked for and found, if any."""
    sizes = (str(size) for size in (compiled.registers, compiled.spills, compiled.shared_bytes))
    table.rows[label, compiled.target] = Row(native or "-", *sizes)
    return compiled


@dataclass(frozen=True)
class Interpreted:
    """One test that ran in the interpreter: its name, the kernels it recorded, and the failure if there was one."""

    test: str
    kernels: tuple[str, ...]
    failure: str | None


def interpret(
    *files: Path, table: Table = TABLE, shares: Sequence[Sequence[str]] = ((),), timeout: float = 280.0
) -> list[Interpreted]:
    """Run the tests of files in other processes under Triton's interpreter, and record them in `table`.

    The interpreter must be chosen before Triton is imported, hence a process. `shares` are the arguments for pytest of
    one process each, which run at the same time. The tests name what they check by `record_property("kernel", label)`;
    they must compare bit for bit, or say so in `record_property("result", ...)`.
    """
    with ThreadPoolExecutor(len(shares)) as pool:
        parts = list(pool.map(lambda arguments: _interpreted_cases(files, arguments, timeout), shares))
    results = []
    for case in itertools.chain.from_iterable(parts):
        properties = [(p.get("name"), p.get("value") or "") for p in case.iter("property")]
        kernels = tuple(value for name, value in properties if name == "kernel")
        failures = [node for node in case if node.tag in ("failure", "error")]
        failure = (failures[0].text or failures[0].get("message")) if failures else None
        results.append(Interpreted(case.get("name", "?"), kernels, failure))
        for kernel in kernels:
            said = next((value for name, value in properties if name == "result"), "bit for bit")
            table.add_interpreted(kernel, "FAILED" if failures else said)
    return results


def _interpreted_cases(files: Sequence[Path], arguments: Sequence[str], timeout: float) -> list[ET.Element]:
    """The test cases in the report of one process."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        command = [sys.executable, "-m", "pytest", *map(str, files), *options]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        root = files[0].parents[2]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=root
        )
        if not report.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return list(ET.parse(report).iter("testcase"))


def interpreter_trouble() -> str | None:
    """Why this Triton cannot interpret a loop: 3.6 makes numbers of arrays in a way that NumPy 2.4 no longer allows."""
    try:
        int(np.zeros(1, np.int32))
    except TypeError:
        if "int(self.handle.data))" in inspect.getsource(interpreter):
            return f"the interpreter of Triton {triton.__version__} cannot loop with NumPy {np.__version__}"
    return None
