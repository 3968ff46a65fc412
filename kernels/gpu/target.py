"""What a GPU can do, as far as the choice of a kernel and its tile sizes depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class GpuTarget:
    """A GPU architecture: `name` is `sm_90` or `gfx950`, `processors` its multiprocessors or compute units."""

    name: str
    processors: int = 128

    @property
    def is_amd(self) -> bool:
        """Whether it is programmed through ROCm."""
        return self.name.startswith("gfx")

    @property
    def capability(self) -> int:
        """CUDA compute capability, 90 for 9.0; 0 for AMD."""
        return 0 if self.is_amd else int(self.name.removeprefix("sm_"))

    @property
    def native_mx(self) -> bool:
        """Whether matrix instructions take MXFP4 and MXFP8 operands with their scales."""
        return self.name == "gfx950" or 100 <= self.capability < 120

    @property
    def native_nvfp4(self) -> bool:
        """Whether matrix instructions take FP4 operands with E4M3 scales of 16."""
        return 100 <= self.capability < 120

    @property
    def fnuz(self) -> bool:
        """Whether its FP8 is E4M3FNUZ."""
        return self.name in ("gfx940", "gfx941", "gfx942")

    @property
    def native_fp8(self) -> bool:
        """Whether matrix instructions take FP8 operands."""
        return self.fnuz or self.name == "gfx950" or self.capability >= 89


def gpu_target(device: torch.device) -> GpuTarget | None:
    """The target of a torch device; None where it is no GPU, or there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _target(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _target(index: int) -> GpuTarget:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return GpuTarget(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return GpuTarget(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
