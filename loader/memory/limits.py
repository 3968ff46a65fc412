"""What this process may still have of memory: by the machine, by the system's limits for it, and by its cgroup."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..control_groups import PROC, group_folders, lines
from ..kernels.system_calls import resource_limit
from ..shortage import NO_MEMORY, Shortage
from .amounts import format_bytes

if TYPE_CHECKING:
    import torch

MACHINE = "the machine"
_NO_LIMIT = 1 << 60
"""From here on a limit of a cgroup of version 1 is none: the kernel says so with the largest page-aligned number."""


@dataclass(frozen=True)
class MemoryLimit:
    """One limit in bytes: its name, what it allows, what counts against it now, and what could be swapped out.

    `is_virtual` says that memory counts once it is mapped; against others it counts when it is first written to.
    `is_shared` says of the memory of a GPU that it is that of the machine.
    """

    name: str
    allowed: int
    used: int
    is_virtual: bool
    swap: int = 0
    is_shared: bool = False

    @property
    def is_machine(self) -> bool:
        """Whether it is no limit that somebody set, but all there is."""
        return self.name == MACHINE

    @property
    def available(self) -> int:
        """What may still be had without swapping."""
        return max(0, self.allowed - self.used)

    @property
    def left(self) -> int:
        """What may still be had at all."""
        return max(0, self.allowed + self.swap - self.used)

    def __str__(self) -> str:
        swap = f" and {format_bytes(self.swap)} of swap" if self.swap else ""
        return f"{self.name} allows {format_bytes(self.allowed)}{swap}, of which {format_bytes(self.left)} are left"


def process_limits(proc: Path = PROC) -> list[MemoryLimit]:
    """The limits there are for this process, on Linux; elsewhere none is known."""
    found = [*_resource_limits(proc), *_cgroup_limits(proc)]
    return sorted(found, key=lambda limit: limit.left)


def memory_limits(proc: Path = PROC) -> list[MemoryLimit]:
    """The limits of this process, and those of the machine."""
    found = [*process_limits(proc), *_commit_limit(proc), _machine(proc)]
    return sorted(found, key=lambda limit: limit.left)


def check_room(nbytes: int, what: str) -> None:
    """Raise `Shortage` where so many bytes cannot be mapped any more, for what is not told so but ended."""
    for limit in process_limits():
        if limit.is_virtual and limit.left < nbytes:
            raise Shortage(f"{NO_MEMORY} {what}: it needs {format_bytes(nbytes)}")


def device_limit(device: torch.device, proc: Path = PROC) -> MemoryLimit | None:
    """The memory of a GPU; what torch's allocator holds and nobody uses counts as available. `None` for a CPU.

    A GPU without memory of its own (DGX Spark, Strix Halo) has that of the machine. Its driver may count the page cache
    as used, which the kernel gives up where memory is asked for: what the machine has available counts there.
    """
    if device.type != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    is_shared = bool(torch.cuda.get_device_properties(device).is_integrated)
    if is_shared:
        free = max(free, min(total, _machine(proc).available))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    used = max(0, total - free - unused)
    return MemoryLimit(f"the memory of {device}", total, used, is_virtual=False, is_shared=is_shared)


def _machine(proc: Path) -> MemoryLimit:
    """What the machine has: the page cache that it would give up counts as available, and so does that of ZFS."""
    sizes = _meminfo(proc)
    if "MemTotal" in sizes and "MemAvailable" in sizes:
        used = max(0, sizes["MemTotal"] - sizes["MemAvailable"] - _zfs_cache(proc))
        return MemoryLimit(MACHINE, sizes["MemTotal"], used, is_virtual=False, swap=sizes.get("SwapFree", 0))
    import psutil  # here, so that a load on Linux does not need it

    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    # macOS compresses what others hold, and makes swap files as it needs them.
    swap = used if sys.platform == "darwin" else psutil.swap_memory().free
    return MemoryLimit(MACHINE, memory.total, used, is_virtual=False, swap=swap)


def _commit_limit(proc: Path) -> Iterator[MemoryLimit]:
    """What may be mapped on the whole machine, where the kernel keeps account of it (vm.overcommit_memory=2)."""
    if _number(proc / "sys/vm/overcommit_memory") == 2:
        sizes = _meminfo(proc)
        if "CommitLimit" in sizes and "Committed_AS" in sizes:
            name = "what the machine lets be mapped (vm.overcommit_memory=2)"
            yield MemoryLimit(name, sizes["CommitLimit"], sizes["Committed_AS"], is_virtual=True)


def _zfs_cache(proc: Path) -> int:
    """What ZFS would give up of its cache, which is no page cache to the kernel."""
    sizes = {
        fields[0]: int(fields[2])
        for line in lines(proc / "spl/kstat/zfs/arcstats")
        if len(fields := line.split()) == 3 and fields[2].isdigit()
    }
    return max(0, sizes.get("size", 0) - sizes.get("c_min", 0))


def _meminfo(proc: Path) -> dict[str, int]:
    """Bytes by name."""
    found = {}
    for line in lines(proc / "meminfo"):
        name, _, size = line.partition(":")
        if size.strip().endswith("kB"):
            found[name] = int(size.split()[0]) << 10
    return found


def _resource_limits(proc: Path) -> Iterator[MemoryLimit]:
    for name, resource, field in (
        ("the address space of the process (RLIMIT_AS, ulimit -v)", "RLIMIT_AS", "VmSize"),
        ("the data of the process (RLIMIT_DATA, ulimit -d)", "RLIMIT_DATA", "VmData"),
    ):
        allowed = resource_limit(resource)
        if allowed is None:
            continue
        used = _field(proc / "self/status", field)
        if used is not None:
            yield MemoryLimit(name, allowed, used << 10, is_virtual=True)


def _cgroup_limits(proc: Path) -> Iterator[MemoryLimit]:
    """Those of the groups that this process is in, from the inmost out; page cache does not count as used."""
    swap_free = _meminfo(proc).get("SwapFree", 0)
    for folder, files in _memory_groups(proc):
        limits = [(size, name) for name in files.limits if (size := _number(folder / name)) is not None]
        used = _number(folder / files.usage)
        if not limits or used is None or min(limits)[0] >= _NO_LIMIT:
            continue
        allowed, name = min(limits)
        cached = sum(_field(folder / "memory.stat", field, " ") or 0 for field in files.reclaimable)
        swap = min(swap_free, _group_swap(folder, files, allowed))
        yield MemoryLimit(
            f"the memory cgroup ({folder / name})", allowed, max(0, used - cached), is_virtual=False, swap=swap
        )


def _group_swap(folder: Path, files: _GroupFiles, allowed: int) -> int:
    """What a group may still swap out."""
    limit, used = _number(folder / files.swap_limit), _number(folder / files.swap_usage) or 0
    if limit is None or limit >= _NO_LIMIT:
        return _NO_LIMIT
    return max(0, limit - allowed if files.swap_counts_memory else limit - used)


@dataclass(frozen=True)
class _GroupFiles:
    """What the files of a group are called, and the fields of what can be reclaimed.

    `swap_counts_memory` says that the limit of swap is one of memory and swap together.
    """

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    swap_limit: str
    swap_usage: str
    swap_counts_memory: bool


_VERSION_1 = _GroupFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "memory.memsw.limit_in_bytes",
    "memory.memsw.usage_in_bytes",
    swap_counts_memory=True,
)
# Above memory.high nothing is killed, but each page that cannot be reclaimed waits for up to two seconds.
_VERSION_2 = _GroupFiles(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
    "memory.swap.max",
    "memory.swap.current",
    swap_counts_memory=False,
)


def _memory_groups(proc: Path) -> Iterator[tuple[Path, _GroupFiles]]:
    """Folders of the groups, and what their files are called."""
    for folder, version in group_folders("memory", proc):
        yield folder, _VERSION_2 if version == 2 else _VERSION_1


def _field(path: Path, name: str, separator: str = ":") -> int | None:
    """The number after a name in a file of such lines; None where there is none."""
    for line in lines(path):
        key, _, value = line.partition(separator)
        if key == name:
            return int(value.split()[0])
    return None


def _number(path: Path) -> int | None:
    """What a file holds, where it is a number."""
    text = "".join(lines(path))
    return int(text) if text.isdigit() else None
