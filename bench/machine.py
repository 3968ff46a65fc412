"""Describe the machine a benchmark ran on: every result file starts with this."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

LIBRARIES = (
    "quantload",
    "torch",
    "transformers",
    "safetensors",
    "numba",
    "llvmlite",
    "triton",
    "numpy",
    "torchao",
    "optimum-quanto",
    "bitsandbytes",
    "accelerate",
)
VECTOR_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that matter here and are installed for the running interpreter."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> tuple[str, list[str]]:
    """Name and vector instruction sets of the first core; the architecture where Linux does not tell."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), [flag for flag in VECTOR_FLAGS if flag in flags]


def describe_machine() -> dict[str, Any]:
    """Date, CPU, cores, memory (bytes), kernel, load average and library versions, ready for JSON."""
    name, vectors = _cpu()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": name,
        "vector_instructions": vectors,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "libraries": library_versions(),
    }


def headline(machine: dict[str, Any]) -> str:
    """One line for the top of a printed table."""
    libraries = machine["libraries"]
    versions = ", ".join(
        f"{name} {libraries[name]}" for name in ("python", "torch", "transformers") if name in libraries
    )
    return (
        f"{machine['date'][:10]}, {machine['cores']} cores of {machine['cpu']}"
        f" ({', '.join(machine['vector_instructions'])}), {machine['memory_bytes'] / 2**30:.0f} GiB,"
        f" {machine['kernel']}, {versions}, load average {machine['load_average'][0]}"
    )


if __name__ == "__main__":
    print(headline(describe_machine()))
