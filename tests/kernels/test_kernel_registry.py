"""The registry: order, reasons, overrides, cheap import, warm-up from several threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from quantload.kernels import registry
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import (
    OPERATIONS,
    Kernel,
    NoKernel,
    candidates,
    kernel_set,
    needed_to_load,
    prepare,
    select,
)
from tested_formats import NUMBA_FORMATS, QUANTIZED


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cpu_prefers_numba_and_can_fall_back_to_torch(name: str, operation: str) -> None:
    found = candidates(operation, name, "cpu")
    numba = ["numba"] if name in NUMBA_FORMATS else []
    assert [kernel.name for kernel, reason in found if reason is None] == [*numba, "torch"]
    assert select(operation, name, "cpu").name == [*numba, "torch"][0]
    assert select(operation, name, torch.device("cpu"), "torch").name == "torch"


def test_the_error_lists_every_candidate_with_its_reason() -> None:
    with pytest.raises(NoKernel) as error:
        select("quantize", "mxfp4", "cuda", "numba")
    assert "numba: runs on cpu only, not on cuda" in str(error.value)
    assert "torch: can run" in str(error.value)
    with pytest.raises(NoKernel, match="meta device holds no data"):
        select("quantize", "mxfp4", "meta")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(NoKernel, match="mxfp4"):
        candidates("quantize", "mxfp5", "cpu")
    with pytest.raises(NoKernel, match="dequantize"):
        candidates("quantise", "mxfp4", "cpu")
    with pytest.raises(NoKernel, match="overrides"):
        kernel_set("mxfp4", "cpu", {"matmul": "torch"})


def test_overrides_choose_by_operation() -> None:
    kernels = kernel_set("int8_channel", "cpu", {"linear": "torch"})
    assert kernels.names["linear"] == "torch"
    assert kernels.names["quantize"] == "numba"
    assert kernels.format is FORMATS["int8_channel"]


def test_importing_the_registry_does_not_import_numba() -> None:
    code = "import sys, quantload.kernels.registry as r; r.kernel_set('mxfp4', 'cpu'); print('numba' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_preparing_in_several_threads_compiles_once() -> None:
    from quantload.kernels.cpu.build import scaled as cpu_build

    errors: list[BaseException] = []

    def warm() -> None:
        try:
            prepare(needed_to_load("int8_channel", "cpu", torch.bfloat16, activation_dtype=torch.bfloat16))
        except BaseException as error:  # so that the main thread can report it
            errors.append(error)

    threads = [threading.Thread(target=warm) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    function = cpu_build.scaled_quantize("int8", "bf16", True)
    assert function is cpu_build.scaled_quantize("int8", "bf16", True)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_activations_stay_as_they_are_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert registry.weight_only(name, "cpu") == {}  # all kernels there are weight-only
    found = registry.candidates("linear", name, "cuda")
    monkeypatch.setattr(registry, "candidates", lambda *_: [(kernel, None) for kernel, _ in found])
    assert registry.weight_only(name, "cuda") == {"linear": "triton"}


def test_what_a_platform_can_run_does_not_depend_on_what_is_here() -> None:
    def names(operation: str, format_name: str, platform: str) -> list[str]:
        return [kernel.name for kernel in registry.platform_kernels(operation, format_name, platform)]

    assert names("linear", "mxfp4", "cpu") == ["numba", "torch"]
    assert names("linear", "mxfp4", "sm_90") == ["triton", "torch"]
    assert names("experts", "mxfp4", "gfx950") == ["aiter", "triton_w4a4", "triton", "torch"]
    assert names("linear", "fp8_channel", "sm_90") == ["scaled_mm", "triton_w8a8", "triton", "torch"]
    assert names("linear", "fp8_channel", "gfx942")[0] == "triton_w8a8"  # in the form it is stored in there
    assert names("quantize", "int4_group128_f16", "cpu") == ["numba", "torch"]
    assert names("linear", "nvfp4", "sm_100") == ["triton_w4a4", "triton", "torch"]
    assert names("linear", "nvfp4", "gfx950") == ["triton", "torch"]
    with pytest.raises(NoKernel, match="unknown platform 'sm_70'; platforms are cpu, sm_80"):
        names("linear", "mxfp4", "sm_70")


def test_a_kernel_of_linear_layers_alone_leaves_experts_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch._scaled_mm`, which can be named for linear layers and has no kernel for experts."""
    found = registry.candidates

    def without_experts(operation: str, *where: Any) -> list[tuple[Kernel, str | None]]:
        return [each for each in found(operation, *where) if (operation, each[0].name) != ("experts", "torch")]

    assert registry.kernel_set("mxfp4", "cpu", {"linear": "torch"}).names["experts"] == "torch"
    monkeypatch.setattr(registry, "candidates", without_experts)
    names = registry.kernel_set("mxfp4", "cpu", {"linear": "torch"}).names
    assert (names["linear"], names["experts"]) == ("torch", "numba")
