"""What GPU a benchmark ran on: name, driver, clocks; or why there is none to run on."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import torch
from quantload.kernels.gpu.target import gpu_target

SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
ROCM_COMMAND = ["rocm-smi", "--showdriverversion", "--showclocks", "--showpower", "--json"]
SMI_SECONDS = 20
LEAST_ROTATED = 512 << 20


def missing_gpu() -> str | None:
    """What is missing to run on a GPU, and how it would be run, in one line; None where there is one."""
    if torch.cuda.is_available():
        return None
    backend = torch.version.cuda or torch.version.hip
    why = "this torch is built without CUDA and ROCm" if backend is None else "torch finds no device"
    return (
        f"No GPU: torch.cuda.is_available() is False ({why}, torch {torch.__version__}); nothing was measured and no "
        f"result written. On a machine with a CUDA or ROCm GPU and a torch built for it: python bench/kernels.py"
    )


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, architecture, sizes in bytes, versions, and the driver's facts, ready for JSON."""
    properties, target = torch.cuda.get_device_properties(device), gpu_target(device)
    assert target is not None
    return {
        "name": properties.name,
        "architecture": target.name,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver_facts(device),
    }


def driver_facts(device: torch.device) -> dict[str, Any]:
    """Driver version, clocks (MHz), power (W) and temperature now; `error` says why they could not be asked for."""
    if torch.version.hip:
        return ask_rocm()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = str(device.index or 0) if uuid is None else f"GPU-{uuid}"
    return ask_nvidia(
        ["nvidia-smi", "-i", which, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    )


def ask_nvidia(command: list[str]) -> dict[str, Any]:
    """What nvidia-smi answers to a query of `SMI_FIELDS`."""
    answer = _answer(command)
    if isinstance(answer, dict):
        return answer
    values = [value.strip() for value in answer.strip().split(",")]
    if len(values) != len(SMI_FIELDS):
        return {"error": f"nvidia-smi answered {answer.strip()!r}"}
    return dict(zip(SMI_FIELDS, values, strict=True))


def ask_rocm() -> dict[str, Any]:
    """What rocm-smi answers, as it stands."""
    answer = _answer(ROCM_COMMAND)
    if isinstance(answer, dict):
        return answer
    try:
        return {"driver_version": "see rocm_smi", "rocm_smi": json.loads(answer)}
    except json.JSONDecodeError:
        return {"error": f"rocm-smi answered {answer.strip()!r}"}


def _answer(command: list[str]) -> str | dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return done.stdout


def rotated_bytes(device: torch.device) -> int:
    """Bytes that calls rotate through, so that the caches hold next to nothing of the next call's."""
    cache = 0 if device.type != "cuda" else getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return max(LEAST_ROTATED, 4 * cache)


def gpu_headline(gpu: dict[str, Any]) -> str:
    """One line: the device, its driver and its clocks."""
    driver = gpu["driver"]
    parts = [gpu["name"], gpu["architecture"], f"{gpu['memory_bytes'] / 2**30:.0f} GiB"]
    parts.append(f"CUDA {gpu['cuda']}" if gpu["cuda"] else f"ROCm {gpu['hip']}")
    parts.append(f"driver {driver.get('driver_version', 'unknown')}")
    if "clocks.sm" in driver:
        parts.append(f"SM clock {driver['clocks.sm']} of {driver['clocks.max.sm']} MHz, memory {driver['clocks.mem']}")
    return ", ".join(parts)
