"""Every kernel that the registry says can run here, as a parametrized fixture."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from quantload.kernels.formats import RowMultiplied, WeightFormat
from quantload.kernels.registry import (
    NUMBA_FORMATS,
    OPERATIONS,
    SCALE_MODES,
    KernelSet,
    candidates,
    kernel_set,
    needed_to_load,
    prepare,
)
from tested_formats import QUANTIZED, TRITON

INTERPRETED = ("quantize", "observe", "finish_scales", "dequantize")
"""The operations that the tests here check in Triton's interpreter as well."""
_called: set[str] = set()
FAMILIES = {**{name: name for name in ("mx", "mxfp4", "mxfp6", "mxfp8", "fp8")}, "int8": "int8_channel"}
"""What the names of the formats begin with that a test is for, by the second word of its name."""

MANY_TESTS = 4000
"""Tests of a run that needs nearly every kernel."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOW: tuple[dict[str, Any], ...] = ({"statistics": True}, {"statistics": False}, {"scale_mode": "mse"})

PLAIN = ("torch", "cpu")
"""The kernels that the `contender` fixture leaves out, because it is compared with them."""


@dataclass(frozen=True)
class Runner:
    """The operations of one format by one backend on one device, with outputs as CPU tensors of bytes."""

    kernels: KernelSet
    device: str

    @property
    def format(self) -> WeightFormat:
        return self.kernels.format

    def empty(self, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.full(self.format.code_shape(rows, cols), 77, dtype=torch.uint8, device=self.device)
        scales = torch.full(self.format.scale_shape(rows, cols), 77, device=self.device)
        return codes.view(self.format.code_dtype), scales.to(self.format.scale_dtype)

    def quantize(self, source: torch.Tensor, statistics: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        codes, scales = self.empty(*source.shape)
        assert self.kernels.quantize(source.to(self.device), (codes, scales), statistics) == 0
        return codes.cpu(), scales.cpu()

    def dequantize(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        out = torch.full(shape, 77.0, dtype=dtype, device=self.device)
        self.kernels.dequantize((codes.to(self.device), scales.to(self.device)), out)
        return out.cpu()


def runners() -> list[Runner]:
    found = interpreted()
    if found:
        return found
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name in QUANTIZED:
            can_run = [{k.name for k, reason in candidates(op, name, device) if reason is None} for op in OPERATIONS]
            for kernel in sorted(set.intersection(*can_run)):
                found.append(Runner(kernel_set(name, device, dict.fromkeys(OPERATIONS, kernel)), device))
    return found


def interpreted() -> list[Runner]:
    """The Triton kernels on the CPU, where this process was started to interpret them; see `gpu_targets.interpret`."""
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return []
    from quantload.kernels.gpu.quantize import triton_quantize

    found = []
    for name in TRITON:
        plain, own = kernel_set(name, "cpu", dict.fromkeys(OPERATIONS, "torch")), triton_quantize(name)
        functions = {op: partial(_noted, f"{op} {name}", getattr(own, op)) for op in INTERPRETED}
        found.append(
            Runner(replace(plain, names={**plain.names, **dict.fromkeys(INTERPRETED, "triton")}, **functions), "cpu")
        )
    return found


def _noted(label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _called.add(label)
    return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def called_kernels(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """The interpreted kernels that a test called, in its report."""
    _called.clear()
    yield
    for label in sorted(_called):
        record_property("kernel", label)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile what a run of nearly all tests needs at once, which its processes share.

    Else it would be compiled by a process for nearly every kernel, each of which has to get ready for that first.
    """
    if len(session.items) < MANY_TESTS or session.config.getoption("collectonly"):
        return
    wanted = itertools.product(QUANTIZED, DTYPES, HOW)
    prepare(
        [
            function
            for name, dtype, how in wanted
            if name in NUMBA_FORMATS and name in SCALE_MODES[how.get("scale_mode", "default")]
            for function in needed_to_load(name, "cpu", dtype, activation_dtype=dtype, **how)
        ]
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in {"runner", "contender"} & set(metafunc.fixturenames):
        family = metafunc.function.__name__.split("_")[1]  # test_mxfp4_..., test_fp8_..., test_int8_...: those only
        prefix = FAMILIES.get(family, "")
        params = [
            pytest.param(r, id=f"{r.format.name}-{r.kernels.names['quantize']}-{r.device}")
            for r in runners()
            if r.format.name.startswith(prefix)
            and not (prefix and isinstance(r.format, RowMultiplied))
            and (fixture == "runner" or (r.kernels.names["quantize"], r.device) != PLAIN)
        ]
        metafunc.parametrize(fixture, params)


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """What reference tools make of the same BF16 bits: `set|in`, `set|tool:format|mode|c` (codes), `...|s` (scales).

    AMD Quark, torchao (0.18 and a later head), compressed-tensors, AMD aiter, vLLM and SGLang, run on a CPU;
    `quark_llama:*` are two weights of a tiny checkpoint that Quark exported. MXFP6 and MXFP8 have a file, and INT4.
    """
    found: dict[str, np.ndarray] = {}
    for name in ("vectors.npz", "vectors_mx.npz", "vectors_int4.npz"):
        with np.load(request.config.rootpath / "tests" / "data" / name) as stored:
            found.update(stored)
    return found


@pytest.fixture(scope="session")
def all_bf16() -> torch.Tensor:
    """Every finite BF16 value, both zeros included: 65280 of them."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[torch.isfinite(values)]


@pytest.fixture(scope="session")
def all_f16() -> torch.Tensor:
    """Every finite FP16 value: 63488 of them."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return values[torch.isfinite(values)]
