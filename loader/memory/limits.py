"""The limits that the system sets for this process: of its address space, its data, and the memory of its cgroup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MemoryBudgetError
from ..kernels.system_calls import resource_limit
from .amounts import format_bytes
from .planner import MemoryPlan

PROC = Path("/proc")
_NO_LIMIT = 1 << 60
"""From here on a limit of a cgroup of version 1 is none: the kernel says so with the largest page-aligned number."""


@dataclass(frozen=True)
class ProcessLimit:
    """One limit in bytes: its name, what it allows, and what counts against it now.

    `is_virtual` says that memory counts once it is mapped; against others it counts when it is first written to.
    """

    name: str
    allowed: int
    used: int
    is_virtual: bool

    @property
    def left(self) -> int:
        """What may still be had."""
        return max(0, self.allowed - self.used)

    def __str__(self) -> str:
        return f"{self.name} allows {format_bytes(self.allowed)}, of which {format_bytes(self.left)} are left"


def process_limits(proc: Path = PROC) -> list[ProcessLimit]:
    """The limits there are, on Linux; elsewhere none is known."""
    found = [*_resource_limits(proc), *_cgroup_limits(proc)]
    return sorted(found, key=lambda limit: limit.left)


def check_limits(plan: MemoryPlan, limits: list[ProcessLimit]) -> None:
    """Raise `MemoryBudgetError` where a load onto the CPU cannot succeed within one of them.

    What is certain to be needed is the model, and of what counts once it is mapped the staging arena too. The rest of
    the predicted peak is an allowance, which a load may stay below.
    """
    for limit in limits:
        needed = plan.final_bytes + (plan.staging_bytes if limit.is_virtual else 0)
        if needed > limit.left:
            beside = f" + staging {format_bytes(plan.staging_bytes)}" if limit.is_virtual else ""
            raise MemoryBudgetError(
                f"the load needs {format_bytes(needed)} (model {format_bytes(plan.final_bytes)}{beside}), its peak is "
                f"predicted at {format_bytes(plan.peak_bytes)}; {limit}: raise that limit, or choose a narrower scheme"
            )


def _resource_limits(proc: Path) -> Iterator[ProcessLimit]:
    for name, resource, field in (
        ("the address space of the process (RLIMIT_AS, ulimit -v)", "RLIMIT_AS", "VmSize"),
        ("the data of the process (RLIMIT_DATA, ulimit -d)", "RLIMIT_DATA", "VmData"),
    ):
        allowed = resource_limit(resource)
        if allowed is None:
            continue
        used = _field(proc / "self/status", field)
        if used is not None:
            yield ProcessLimit(name, allowed, used << 10, is_virtual=True)


def _cgroup_limits(proc: Path) -> Iterator[ProcessLimit]:
    """Those of the groups that this process is in, from the inmost out; what can be swapped out counts as room."""
    swap = (_field(proc / "meminfo", "SwapFree") or 0) << 10
    for folder, names in _memory_groups(proc):
        allowed, used = (_number(folder / name) for name in names[:2])
        if allowed is None or used is None or allowed >= _NO_LIMIT:
            continue
        files = sum(_field(folder / "memory.stat", name, " ") or 0 for name in names[2:])
        name = f"the memory cgroup ({folder / names[0]})"
        yield ProcessLimit(name, allowed + swap, max(0, used - files), is_virtual=False)


_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"
_VERSION_2 = "memory.max", "memory.current", "inactive_file", "active_file"


def _memory_groups(proc: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders of the groups, and what their files and the fields of what can be reclaimed are called."""
    for controllers, group in _own_groups(proc):
        for kind, options, root, mount in _mounts(proc):
            if kind == "cgroup2" and not controllers:
                names = _VERSION_2
            elif kind == "cgroup" and "memory" in controllers and "memory" in options:
                names = _VERSION_1
            else:
                continue
            # What is mounted may itself be a group below the root, as in a container.
            inside = group.removeprefix(root) if root != "/" and group.startswith(root) else group
            folder = mount / inside.strip("/")
            while not folder.is_dir() and folder != mount:
                folder = folder.parent
            yield from ((each, names) for each in (folder, *folder.parents) if each == mount or mount in each.parents)


def _own_groups(proc: Path) -> Iterator[tuple[list[str], str]]:
    for line in _lines(proc / "self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield [name for name in parts[1].split(",") if name], parts[2]


def _mounts(proc: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Kind, options, root and place of each mounted file system."""
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, last = before.split(), after.split()
        if len(fields) > 4 and len(last) > 2:
            yield last[0], last[2].split(","), fields[3], Path(fields[4])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _field(path: Path, name: str, separator: str = ":") -> int | None:
    """The number after a name in a file of such lines; None where there is none."""
    for line in _lines(path):
        key, _, value = line.partition(separator)
        if key == name:
            return int(value.split()[0])
    return None


def _number(path: Path) -> int | None:
    """What a file holds, where it is a number."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None
