"""The limits of a process, as the kernel's files tell them, and what a load says that cannot keep within them."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from quantload.errors import MemoryBudgetError
from quantload.memory.budget import memory_running_out
from quantload.memory.limits import MACHINE, device_limit, memory_limits, process_limits
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
    assert (limit.allowed, limit.used, limit.swap, limit.is_virtual) == (4000, 2000, MIB, False)
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
    assert (limit.allowed, limit.used, limit.available, limit.left) == (5000, 40, 4960, 4960 + MIB)


@pytest.mark.parametrize(
    ("files", "swap"),
    [
        ({"memory.swap.max": "0"}, 0),
        ({"memory.swap.max": "max"}, MIB),
        ({"memory.swap.max": "900", "memory.swap.current": "400"}, 500),
        ({"memory.swap.max": f"{4 * MIB}", "memory.swap.current": "0"}, MIB),
    ],
)
def test_a_group_swaps_no_more_than_it_may_and_than_the_machine_has(
    tmp_path: Path, files: dict[str, str], swap: int
) -> None:
    root = tmp_path / "sys"
    proc = groups(tmp_path, "0::/", f"30 20 0:26 / {root} rw - cgroup2 cgroup2 rw")
    written(root, {"memory.max": "4000", "memory.current": "3500", **files})
    (limit,) = process_limits(proc)
    assert limit.swap == swap


def test_memory_and_swap_together_are_one_limit_in_version_1(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    proc = groups(tmp_path, "4:memory:/", f"30 20 0:26 / {root} rw - cgroup cgroup rw,memory")
    written(root, {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "100"})
    written(root, {"memory.memsw.limit_in_bytes": "5600", "memory.memsw.usage_in_bytes": "100"})
    (limit,) = process_limits(proc)
    assert (limit.swap, limit.left) == (600, 5500)


def test_a_group_is_throttled_before_it_is_full(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    proc = groups(tmp_path, "0::/", f"30 20 0:26 / {root} rw - cgroup2 cgroup2 rw")
    written(root, {"memory.max": "max", "memory.high": "2000", "memory.current": "500"})
    (limit,) = process_limits(proc)
    assert (limit.allowed, limit.name) == (2000, f"the memory cgroup ({root}/memory.high)")


MEMINFO = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\nSwapFree: 50 kB"


def test_the_machine_has_what_the_kernel_says_is_available_page_cache_and_zfs_cache_included(tmp_path: Path) -> None:
    proc = written(tmp_path, {"meminfo": MEMINFO})
    (limit,) = memory_limits(proc)
    assert (limit.name, limit.allowed, limit.available, limit.left) == (MACHINE, 1000 << 10, 600 << 10, 650 << 10)
    written(tmp_path, {"spl/kstat/zfs/arcstats": f"name type data\nsize 4 {300 << 10}\nc_min 4 {100 << 10}"})
    (limit,) = memory_limits(proc)
    assert limit.available == 800 << 10


def test_in_a_container_that_sees_the_memory_of_its_host_the_group_decides(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    proc = groups(tmp_path, "0::/", f"30 20 0:26 / {root} rw - cgroup2 cgroup2 rw")
    written(tmp_path / "proc", {"meminfo": MEMINFO})
    written(root, {"memory.max": str(200 << 10), "memory.current": str(50 << 10), "memory.swap.max": "0"})
    first, second = memory_limits(proc)
    assert (first.available, first.is_machine, second.is_machine) == (150 << 10, False, True)


def test_mappings_are_limited_where_the_kernel_keeps_account_of_them(tmp_path: Path) -> None:
    text = f"{MEMINFO}\nCommitLimit: 700 kB\nCommitted_AS: 400 kB"
    proc = written(tmp_path, {"meminfo": text, "sys/vm/overcommit_memory": "2"})
    first, _ = memory_limits(proc)
    assert (first.is_virtual, first.available) == (True, 300 << 10)
    written(tmp_path, {"sys/vm/overcommit_memory": "0"})
    assert len(memory_limits(proc)) == 1


@pytest.mark.parametrize(("platform", "left"), [("darwin", 1000), ("win32", 400)])
def test_other_systems_say_what_they_have_through_psutil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, left: int
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=300))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=100))
    (limit,) = memory_limits(tmp_path)
    assert (limit.available, limit.left) == (300, left)


def test_what_the_allocator_of_a_gpu_holds_and_nobody_uses_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_limit(torch.device("cpu")) is None
    a_gpu(monkeypatch, free=400, total=1000, is_integrated=0)
    limit = device_limit(torch.device("cuda:0"))
    assert limit is not None
    assert (limit.name, limit.available, limit.left) == ("the memory of cuda:0", 550, 550)
    assert not limit.is_shared


def a_gpu(monkeypatch: pytest.MonkeyPatch, free: int, total: int, is_integrated: int) -> None:
    """One of whose memory torch holds 200 bytes and uses 50."""
    for name, value in (
        ("mem_get_info", (free, total)), ("memory_reserved", 200), ("memory_allocated", 50),
        ("get_device_properties", SimpleNamespace(is_integrated=is_integrated)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)


@pytest.mark.parametrize(
    ("free", "total", "available"),
    [
        (100, 1000 << 10, (300 << 10) + 150),  # the driver counts the page cache as used, the machine does not
        (350 << 10, 1000 << 10, (350 << 10) + 150),
        (100, 200 << 10, 200 << 10),  # no more than the driver lets be mapped
    ],
)
def test_a_gpu_that_shares_the_memory_of_the_machine_has_what_that_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, total: int, available: int
) -> None:
    a_gpu(monkeypatch, free, total, is_integrated=1)
    proc = written(tmp_path, {"meminfo": "MemTotal: 1000 kB\nMemAvailable: 300 kB\nSwapFree: 0 kB"})
    limit = device_limit(torch.device("cuda:0"), proc)
    assert limit is not None
    assert (limit.available, limit.is_shared) == (available, True)


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
