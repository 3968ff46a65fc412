"""The limits of a process, as the kernel's files tell them, and what a load says that cannot keep within them."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import pytest
from quantload.errors import MemoryBudgetError
from quantload.memory.budget import memory_running_out
from quantload.memory.limits import ProcessLimit, check_limits, process_limits
from quantload.memory.planner import MemoryPlan, ParameterSize, plan_memory
from quantload.shortage import Shortage

MIB = 1 << 20


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def groups(folder: Path, cgroup: str, mount: str) -> Path:
    """A /proc in which this process is in a group, and one hierarchy is mounted."""
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mount, "proc/meminfo": "SwapFree:   1024 kB"}
    return written(folder, files) / "proc"


def test_version_2_counts_what_cannot_be_reclaimed_in_every_group_up_to_the_root(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    proc = groups(tmp_path, "0::/outer/inner", f"30 20 0:26 / {root} rw - cgroup2 cgroup2 rw")
    stat = "anon 1\nfile 9\ninactive_file 1000\nactive_file 500"
    written(root, {"outer/memory.max": "4000", "outer/memory.current": "3500", "outer/memory.stat": stat})
    written(root, {"outer/inner/memory.max": "max", "outer/inner/memory.current": "3000"})
    (limit,) = process_limits(proc)
    assert (limit.allowed, limit.used, limit.is_virtual) == (4000 + MIB, 2000, False)
    assert str(root / "outer/memory.max") in limit.name


def test_version_1_in_a_container_whose_own_group_is_what_is_mounted(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    proc = groups(
        tmp_path, "4:memory:/docker/abc\n3:cpu:/x", f"30 20 0:26 /docker/abc {root} rw - cgroup cgroup rw,memory"
    )
    written(
        root, {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "100", "memory.stat": "total_active_file 60"}
    )
    (limit,) = process_limits(proc)
    assert (limit.allowed, limit.used, limit.left) == (5000 + MIB, 40, 4960 + MIB)


@pytest.mark.parametrize("text", ["9223372036854771712", "max", ""])
def test_a_group_without_a_limit_is_none(tmp_path: Path, text: str) -> None:
    root = tmp_path / "sys"
    proc = groups(tmp_path, "4:memory:/", f"30 20 0:26 / {root} rw - cgroup cgroup rw,memory")
    written(root, {"memory.limit_in_bytes": text, "memory.usage_in_bytes": "100"})
    assert process_limits(proc) == []


def test_a_system_without_proc_has_no_known_limits(tmp_path: Path) -> None:
    assert process_limits(tmp_path) == []


def test_limits_of_the_process_are_what_setrlimit_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = written(tmp_path, {"self/status": "VmSize:\t    3000 kB\nVmData:\t    1000 kB"})
    allowed = {resource.RLIMIT_AS: (4096 << 10, -1), resource.RLIMIT_DATA: (1 << 10, -1)}
    monkeypatch.setattr(resource, "getrlimit", lambda number: allowed[number])
    found = process_limits(proc)
    assert [(limit.left, limit.is_virtual) for limit in found] == [(0, True), (1096 << 10, True)]  # the tightest first


@pytest.fixture
def plan() -> MemoryPlan:
    """A model of 100 MiB, an arena of 20 and the allowance of 64."""
    return plan_memory([ParameterSize("a", "linear", "none", 100 * MIB, 100 * MIB)], 0, 20 * MIB)


@pytest.mark.parametrize(
    ("left", "is_virtual", "fits"),
    [(120, True, True), (119, True, False), (119, False, True), (100, False, True), (99, False, False)],
)
def test_a_load_is_refused_that_cannot_succeed_and_no_other(
    plan: MemoryPlan, left: int, is_virtual: bool, fits: bool
) -> None:
    limit = ProcessLimit("the limit", 500 * MIB, (500 - left) * MIB, is_virtual)
    if fits:
        check_limits(plan, [limit])
        return
    with pytest.raises(MemoryBudgetError, match=rf"the limit allows 500\.000 MiB, of which {left}\.000 MiB are left"):
        check_limits(plan, [dataclasses.replace(limit, used=0), limit])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
        (Shortage("there was no memory for the arena"), "for the arena"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
                         "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"),
            "a tensor of 4096 bytes",
        ),
    ],
)  # fmt: skip
def test_whatever_finds_no_memory_says_what_was_predicted(plan: MemoryPlan, error: Exception, said: str) -> None:
    predicted = rf"{said}.*predicted peak of the load is 184\.000 MiB"
    with pytest.raises(MemoryBudgetError, match=predicted) as caught, memory_running_out([plan]):
        raise error
    assert type(caught.value) is MemoryBudgetError
    assert caught.value.__cause__ is error
    with pytest.raises(MemoryBudgetError, match="had not been planned yet"), memory_running_out([]):
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("size mismatch"), ValueError()])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_running_out([]):
        raise error
    assert caught.value is error
