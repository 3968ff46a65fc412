"""Why Triton kernels can or cannot run on a device, and what FP8 is stored as there."""

from __future__ import annotations

import sys

import pytest
import torch
from quantload.errors import NoKernelError
from quantload.kernels.formats import FNUZ, FORMATS
from quantload.kernels.gpu import quantizers as gpu_quantize
from quantload.kernels.gpu.target import GpuTarget
from quantload.kernels.registry import OPERATIONS, NoKernel, kernel_set, needed_to_load, select
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from tested_formats import TRITON

CUDA = torch.device("cuda")


def pretend(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    target = None if name is None else GpuTarget(name)
    monkeypatch.setattr(gpu_quantize, "gpu_target", lambda device: target if device.type == "cuda" else None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sm_75", "sm_80 or newer"), (None, "no GPU"), ("sm_80", None), ("sm_100", None), ("gfx942", None)],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, name: str | None, reason: str | None) -> None:
    pytest.importorskip("triton", reason="Triton is on Linux only")
    pretend(monkeypatch, name)
    found = gpu_quantize.triton_unavailable(CUDA)
    assert found is None if reason is None else reason in (found or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ("no GPU" if name is None else "unset it") in (gpu_quantize.triton_unavailable(CUDA) or "")


def test_a_gpu_without_triton_is_told_what_to_install_and_gets_nothing_slower_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "sm_90")
    monkeypatch.setitem(sys.modules, "triton", None)
    for format_name in TRITON:
        for operation in OPERATIONS:
            with pytest.raises(NoKernel, match=r"triton: triton is not installed.*pip install triton.*torch: can run"):
                select(operation, format_name, CUDA)
            assert select(operation, format_name, CUDA, "torch").name == "torch"
        by_name = dict.fromkeys(OPERATIONS, "torch")
        assert set(kernel_set(format_name, CUDA, by_name).names.values()) == {"torch"}
        assert needed_to_load(format_name, CUDA, torch.bfloat16) == []
    assert select("quantize", "mxfp4", "cpu").name == "numba"
    with pytest.raises(NoKernelError, match="pip install triton"):
        SchemeFactory(CUDA, LoadOptions()).linear("quark_mxfp4")


def test_a_gpu_that_triton_is_not_for_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "sm_75")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert select("quantize", "mxfp4", CUDA).name == "torch"


@pytest.mark.parametrize("operation", gpu_quantize.OPERATIONS)
@pytest.mark.parametrize("name", TRITON)
def test_triton_comes_before_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, operation: str) -> None:
    pytest.importorskip("triton", reason="Triton is on Linux only")
    pretend(monkeypatch, "sm_90")
    assert select(operation, name, CUDA).name == "triton"
    assert select(operation, name, "cpu").name != "triton"


def test_fp8_is_fnuz_on_gfx942_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORMATS:
        pretend(monkeypatch, "gfx942")
        assert gpu_quantize.stored_format(name, CUDA) == FNUZ.get(FORMATS[name], FORMATS[name]).name
        assert gpu_quantize.stored_format(name, torch.device("cpu")) == name
        pretend(monkeypatch, "gfx950")
        assert gpu_quantize.stored_format(name, CUDA) == name
    pretend(monkeypatch, "gfx942")
    assert kernel_set("fp8_block", CUDA).format.code_dtype == torch.float8_e4m3fnuz
    assert kernel_set("fp8_block_fnuz", CUDA).format.name == "fp8_block_fnuz"
