"""Which memory pieces are worked on in, by device."""

from __future__ import annotations

import torch

from .device import DeviceMemory
from .workspace import HostMemory, WorkingMemory

CPU = torch.device("cpu")


def slots_per_worker(device: torch.device) -> int:
    """Buffers of a worker on the device that pieces are worked on."""
    return HostMemory.slots_per_worker if device.type == "cpu" else DeviceMemory.slots_per_worker


def working_memory(device: torch.device, workers: int, slot_bytes: int) -> WorkingMemory:
    """Buffers of at least `slot_bytes` bytes for so many workers."""
    return HostMemory(workers, slot_bytes) if device.type == "cpu" else DeviceMemory(workers, slot_bytes, device)
