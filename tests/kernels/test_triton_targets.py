"""The harness finds what it is for: spills, native instructions, compile errors, failures in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is on Linux only")

import triton
import triton.language as tl
from gpu_kernel_table import Table
from gpu_targets import TARGETS, add_compiled, compile_for, interpret


@triton.jit  # type: ignore[untyped-decorator]
def _normalize(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    values = tl.load(x + i)
    tl.store(y + i, values * tl.sum(values))


@triton.jit  # type: ignore[untyped-decorator]
def _too_many_types(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).no_such_method())


@pytest.mark.parametrize("target", TARGETS)
def test_registers_and_assembly(target: str) -> None:
    signature = {"x": "*fp32:16", "y": "*fp32:16"}
    built = compile_for(_normalize, signature, target, constants={"N": 256}, num_warps=1)
    assert built.registers > 0
    assert built.spills == 0
    assert built.find(r"buffer_store|st\.global")
    assert built.find("no such instruction") is None


@pytest.mark.parametrize(
    ("target", "count", "few_registers"),
    [("gfx950", 16384, {"waves_per_eu": 8}), ("sm_90", 4096, {"maxnreg": 32})],
)
def test_spills_are_seen(target: str, count: int, few_registers: dict[str, int]) -> None:
    signature = {"x": "*fp32", "y": "*fp32"}
    built = compile_for(_normalize, signature, target, constants={"N": count}, num_warps=1, **few_registers)
    assert built.spills > 0


def test_what_does_not_compile_raises() -> None:
    with pytest.raises(Exception, match="no_such_method"):
        compile_for(_too_many_types, {"x": "*fp32", "y": "*fp32"}, "gfx950", constants={"N": 64})
    with pytest.raises(ValueError, match="'z'"):
        compile_for(_normalize, {"x": "*fp32", "z": "*fp32"}, "gfx950", constants={"N": 64})


def test_interpreted_failures_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "interpreted_x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import triton\n"
        "def test_good(record_property):\n"
        "    record_property('kernel', 'a')\n"
        "    assert triton.knobs.runtime.interpret\n"
        "def test_bad(record_property):\n"
        "    record_property('kernel', 'b')\n"
        "    assert 1 == 2\n"
    )
    good, bad = interpret(file, table=Table())
    assert (good.kernels, good.failure) == (("a",), None)
    assert bad.failure is not None
    assert "1 == 2" in bad.failure


def test_table_has_one_line_a_kernel_and_target() -> None:
    table = Table()
    assert table.lines() == []
    built = compile_for(_normalize, {"x": "*fp32", "y": "*fp32"}, "sm_80", constants={"N": 64}, num_warps=1)
    add_compiled("norm", built, "st.global", table)
    table.add_interpreted("norm", "bit for bit")
    table.add_interpreted("other", "FAILED")
    table.add_interpreted("other", "bit for bit")
    whole = Table()
    whole.merge(table.record())
    lines = whole.lines()
    assert [line.split()[0] for line in lines] == ["kernel", "norm", "other"]
    assert lines[1].endswith("bit for bit")
    assert lines[2].endswith("FAILED")
