"""Probes measured against memory that is really taken, in a process of its own each time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from quantload.memory.probes import AllocatorProbe, AnonymousRssProbe, probe_for

MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def in_fresh_process(body: str, *arguments: str) -> list[float]:
    """Run `body`, which prints numbers, where no other test has touched the heap."""
    prelude = "import mmap, os, sys, time\nfrom quantload.memory.probes import AnonymousRssProbe\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(body), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@linux
def test_anonymous_memory_counts_and_file_and_shared_pages_do_not(tmp_path: Path) -> None:
    """64 MiB of a touched file mapping and of shared memory are invisible, 48 MiB anonymous are seen and given back."""
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * (64 * MIB))
    from_file, from_shared, from_anonymous, after, peak = in_fresh_process(
        """
        probe = AnonymousRssProbe()
        base = probe.current()
        with open(sys.argv[1], "rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        sum(mapped[i] for i in range(0, len(mapped), 4096))
        print(probe.current() - base)
        shared = mmap.mmap(-1, 64 << 20)
        for i in range(0, len(shared), 4096): shared[i] = 1
        print(probe.current() - base)
        probe.reset_peak()
        base = probe.current()
        private = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for i in range(0, len(private), 4096): private[i] = 1
        print(probe.current() - base)
        private.close()
        print(probe.current() - base, probe.peak() - base)
        """,
        str(file),
    )
    assert abs(from_file) < 2 * MIB
    assert abs(from_shared) < 2 * MIB
    assert from_anonymous == pytest.approx(48 * MIB, abs=2 * MIB)
    assert abs(after) < 2 * MIB
    assert peak == pytest.approx(48 * MIB, abs=2 * MIB)


@linux
def test_value_is_rss_anon_of_the_kernel() -> None:
    probe_value, rss_anon = in_fresh_process(
        """
        import re
        probe = AnonymousRssProbe()
        status = open("/proc/self/status").read()
        print(probe.current(), int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) * 1024)
        """
    )
    assert probe_value == pytest.approx(rss_anon, abs=MIB)


@linux
def test_thread_sees_a_peak_that_comes_and_goes_between_calls() -> None:
    """Memory held for 50 ms and given back is in the peak with the thread, and is missed without it."""
    off, on, threads = in_fresh_process(
        """
        import threading
        def spike():
            private = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for i in range(0, len(private), 4096): private[i] = 1
            time.sleep(0.05)
            private.close()
        probe = AnonymousRssProbe()
        base = probe.current()
        spike()
        print(probe.peak() - base)
        with probe:
            spike()
        print(probe.peak() - base, threading.active_count())
        """
    )
    assert off < 2 * MIB
    assert on == pytest.approx(32 * MIB, abs=2 * MIB)
    assert threads == 1


@linux
def test_forked_child_reads_its_own_memory() -> None:
    parent, child = in_fresh_process(
        """
        probe = AnonymousRssProbe()
        base = probe.current()
        read, write = os.pipe()
        if os.fork() == 0:
            private = mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for i in range(0, len(private), 4096): private[i] = 1
            os.write(write, str(probe.current() - base).encode())
            os._exit(0)
        os.wait()
        print(probe.current() - base, os.read(read, 64).decode())
        """
    )
    assert abs(parent) < 4 * MIB
    assert child > 38 * MIB


def test_start_and_stop_may_be_repeated_and_leave_no_thread() -> None:
    probe = AnonymousRssProbe(period=0.002)
    before = threading.active_count()
    probe.stop()
    for _ in range(3):
        probe.start()
        probe.start()
        assert threading.active_count() == before + 1
        probe.stop()
        probe.stop()
        assert threading.active_count() == before


@linux
def test_probe_closes_its_descriptor() -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_descriptors()
    probes = [AnonymousRssProbe() for _ in range(10)]
    assert open_descriptors() == before + 10
    del probes
    assert open_descriptors() == before


def test_reset_peak_forgets_what_was_before() -> None:
    probe = AnonymousRssProbe()
    probe._peak = 1 << 60
    probe.reset_peak()
    assert probe.peak() < 1 << 50


@linux
@linux
@pytest.mark.timing
def test_sampling_costs_under_a_hundredth_of_two_cores() -> None:
    """Processor time of the sampling thread per second of wall time, while a core works as in a load.

    To wake an idle machine costs the thread more, and nobody. The best try looks past others on the machine.
    """
    shares = [1.0]
    work = bytes(1 << 20)
    with AnonymousRssProbe():
        (sampler,) = (thread for thread in threading.enumerate() if thread.name == "quantload-memory")
        assert sampler.ident is not None
        clock = time.pthread_getcpuclockid(sampler.ident)
        while min(shares) >= 0.01 and len(shares) <= 30:
            processor, wall = time.clock_gettime(clock), time.perf_counter()
            while time.perf_counter() - wall < 0.2:
                hashlib.sha256(work)  # lets go of the interpreter's lock
            shares.append((time.clock_gettime(clock) - processor) / (time.perf_counter() - wall) / 2)
    assert min(shares) < 0.01


def test_probe_for_picks_by_device() -> None:
    probe = probe_for("cpu")
    assert probe.kind == "CPU"
    assert probe.device == torch.device("cpu")
    with pytest.raises(ValueError, match="no memory probe for device meta"):
        probe_for("meta")
    with pytest.raises(ValueError, match="AnonymousRssProbe for host memory"):
        AllocatorProbe("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_allocator_probe_follows_tensors() -> None:
    probe = probe_for("cuda")
    assert probe.kind == "GPU"
    assert probe.device.index is not None
    base = probe.current()
    probe.reset_peak()
    first = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    second = torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")
    del second
    assert probe.current() - base == first.nbytes
    assert probe.peak() - base == 48 * MIB
    probe.reset_peak()
    assert probe.peak() - base == first.nbytes


def test_allocator_probe_reads_the_statistics_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def answer(value: int, device: object) -> int:
        asked.append(device)
        return value

    monkeypatch.setattr(torch.cuda, "memory_allocated", partial(answer, 5))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", partial(answer, 7))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    probe = AllocatorProbe("cuda:1")
    probe.reset_peak()
    assert (probe.current(), probe.sample(), probe.peak()) == (5, 5, 7)
    assert set(asked) == {torch.device("cuda", 1)}
