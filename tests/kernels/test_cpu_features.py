"""The bytes do not depend on the instruction set the kernels are compiled for."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys

import pytest
from tested_formats import NUMBA_FORMATS, QUANTIZED

SCRIPT = """
import hashlib, torch
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import SCALE_MODES, kernel_set
digest = hashlib.sha256()
generator = torch.Generator().manual_seed(0)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    source = torch.randn(130, 333, generator=generator) * torch.exp(2 * torch.randn(130, 1, generator=generator))
    source = source.to(dtype)
    source[7] = 0
    source[9] *= 1e-30
    source[11, 40], source[12, 300] = torch.finfo(dtype).max, torch.finfo(dtype).min
    source[13] = torch.finfo(dtype).smallest_normal / 2
    for mode, name in ((mode, name) for mode in SCALE_MODES for name in FORMAT_NAMES if name in SCALE_MODES[mode]):
        fmt = FORMATS[name]
        for kernel in KERNELS:
            tensors = tuple(torch.zeros_like(tensor) for tensor in fmt.empty(130, 333))
            out = torch.zeros(130, 333, dtype=torch.bfloat16)
            kernels = kernel_set(name, "cpu", dict.fromkeys(("quantize", "dequantize"), kernel), mode)
            assert kernels.quantize(source, tensors) == 0
            kernels.dequantize(tensors, out)
            for tensor in (*tensors, out):
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def digest(kernel: str, environment: dict[str, str]) -> str:
    names = sorted(set(QUANTIZED) & set(NUMBA_FORMATS))
    code = SCRIPT.replace("KERNELS", repr([kernel])).replace("FORMAT_NAMES", repr(names))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def plain() -> str:
    return digest("torch", {})


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86-64 processors")
@pytest.mark.parametrize("cpu", ["x86-64", "haswell", None])
def test_same_bytes_on_every_x86(plain: str, cpu: str | None) -> None:
    environment = {} if cpu is None else {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    assert len(plain) == hashlib.sha256().digest_size * 2
    assert digest("numba", environment) == plain
