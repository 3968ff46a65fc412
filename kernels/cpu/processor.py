"""What the processor that numba compiles for can do beyond what every LLVM target can.

`NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` are honoured, as they decide what numba compiles for.
"""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm
from numba.core import config

_BYTES = "avx512vbmi", "avx512vnni"
FEATURES_OF = {
    "haswell": ("fma", "f16c"),
    "broadwell": ("fma", "f16c"),
    "znver1": ("fma", "f16c"),
    "znver2": ("fma", "f16c"),
    "znver3": ("fma", "f16c"),
    "x86-64-v3": ("fma", "f16c"),
    "skylake-avx512": ("fma", "f16c", "avx512bw"),
    "icelake-server": ("fma", "f16c", "avx512bw", *_BYTES),
    "x86-64-v4": ("fma", "f16c", "avx512bw"),
    "cooperlake": ("fma", "f16c", "avx512bw", "avx512bf16"),
    "sapphirerapids": ("fma", "f16c", "avx512bw", "avx512bf16", "amx-bf16", *_BYTES),
    "graniterapids": ("fma", "f16c", "avx512bw", "avx512bf16", "amx-bf16", *_BYTES),
    "znver4": ("fma", "f16c", "avx512bw", "avx512bf16", *_BYTES),
    "znver5": ("fma", "f16c", "avx512bw", "avx512bf16", *_BYTES),
}
"""LLVM features, of those this package asks for, by the processor names that people pass to numba."""


@cache
def has(feature: str) -> bool:
    """Whether the processor compiled for has an LLVM feature.

    They are `fma`, `f16c`, `avx512bw`, `avx512bf16`, `avx512vbmi`, `avx512vnni` and `amx-bf16`.
    """
    if llvm.get_process_triple().startswith(("aarch64", "arm64")):
        return feature == "fma"
    features, name = config.CPU_FEATURES, config.CPU_NAME or "host"
    if features is None or (not features and name == "host"):
        return bool(llvm.get_host_cpu_features().get(feature, False))
    return f"+{feature}" in features.split(",") or feature in FEATURES_OF.get(name, ())
