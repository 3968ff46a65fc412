"""Threads: as many as the quota allows, and idle ones sleep, unless the environment says otherwise."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantload import threads
from quantload.cli import commands, generate, serve

Files = dict[str, str]


def processes(root: Path, version: int, groups: dict[str, Files]) -> Path:
    """A /proc whose process is in the group `a/b` of a hierarchy that has files at these paths."""
    mount, proc = root / "cgroup", root / "proc"
    for path, files in groups.items():
        (mount / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (mount / path / name).write_text(text)
    (proc / "self").mkdir(parents=True)
    kind, options, named = ("cgroup2", "rw", "") if version == 2 else ("cgroup", "rw,cpu,cpuacct", "cpu,cpuacct")
    (proc / "self/mountinfo").write_text(f"1 0 0:1 / {mount} rw - {kind} {kind} {options}\n")
    (proc / "self/cgroup").write_text(f"0:{named}:/a/b\n")
    return proc


@pytest.mark.parametrize(
    ("version", "groups", "quota"),
    [
        (2, {"a/b": {"cpu.max": "max 100000\n"}}, None),
        (2, {"a/b": {"cpu.max": "150000 100000\n"}}, 1.5),
        (2, {"a": {"cpu.max": "50000 100000"}, "a/b": {"cpu.max": "max 100000"}}, 0.5),
        (1, {"a/b": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}}, None),
        (1, {"a/b": {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}}, 3.0),
        (2, {"a/b": {}}, None),
    ],
)
def test_the_smallest_quota_of_all_groups_counts(
    tmp_path: Path, version: int, groups: dict[str, Files], quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = processes(tmp_path, version, groups)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    assert threads.processor_quota(proc) == quota
    assert threads.usable_cores(proc) == (1 if quota == 0.5 else 2)


def settled(monkeypatch: pytest.MonkeyPatch, environ: Files, count: int | None, quota: float | None) -> Files:
    """The environment after `settle_threads`, in a process on four cores that has not imported torch."""
    monkeypatch.setattr(threads, "os", SimpleNamespace(environ=environ))
    monkeypatch.setattr(threads, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "processor_quota", lambda proc=None: quota)
    threads.settle_threads(count)
    return environ


PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("given", "count", "quota", "more"),
    [
        ({}, None, None, PASSIVE),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None, None, {}),
        ({"GOMP_SPINCOUNT": "5"}, None, None, {}),
        ({}, None, 1.2, PASSIVE | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
        ({"OMP_NUM_THREADS": "3"}, None, 1.0, PASSIVE),
        ({"OMP_NUM_THREADS": "3"}, 8, 1.0, PASSIVE | {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8"}),
    ],
)
def test_what_the_environment_says_stays(
    monkeypatch: pytest.MonkeyPatch, given: Files, count: int | None, quota: float | None, more: Files
) -> None:
    assert settled(monkeypatch, dict(given), count, quota) == given | more


def test_after_torch_only_a_count_changes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    before, environ = torch.get_num_threads(), dict(os.environ)
    try:
        threads.settle_threads()
        assert torch.get_num_threads() == before
        threads.settle_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert dict(os.environ) == environ


def test_too_many_threads_for_the_quota_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "processor_quota", lambda: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads.warn_of_threads.cache_clear()
    with caplog.at_level(logging.WARNING, "quantload"):
        threads.warn_of_threads()
        threads.warn_of_threads()
    (said,) = [each.message for each in caplog.records]
    assert "torch.set_num_threads(1)" in said
    threads.warn_of_threads.cache_clear()


@pytest.mark.parametrize("command", ["load", "plan", "serve", "generate"])
def test_the_option_of_a_command_is_what_is_settled(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    told: list[int | None] = []
    for module in (commands, generate, serve):
        monkeypatch.setattr(module, "settle_threads", lambda count=None: told.append(count))
    given = ["--prompt", "hello"] if command == "generate" else []
    monkeypatch.setattr(
        sys, "argv", ["quantload", command, "/nowhere", "--threads", "3", "-q", "no such scheme", *given]
    )
    with pytest.raises(SystemExit):
        commands.main()
    assert told == [None, 3]
