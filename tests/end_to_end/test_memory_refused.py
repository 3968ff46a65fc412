"""Loads to which the system refuses memory, threads, huge pages or open files."""

from __future__ import annotations

import errno
import itertools
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import logits, named
from process_state import descriptors, threads
from quantload import LoadOptions, convert_checkpoint, load_quantized, shortage
from quantload.errors import MemoryBudgetError

Checkpoint = Callable[[str], Path]
PREDICTED = r".*predicted peak of the load is \d"


def allow_mappings(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The system gives so many of the mappings that are asked for, and no more."""
    real, given = mmap.mmap, itertools.count(1)

    def limited(*arguments: Any, **named_ones: Any) -> mmap.mmap:
        if next(given) > count:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*arguments, **named_ones)

    monkeypatch.setattr(mmap, "mmap", limited)


@pytest.mark.parametrize(("count", "what"), [(0, "the tensors of the model, part 1 of 1"), (1, "the staging arena, ")])
def test_a_mapping_that_is_refused_ends_the_load_before_a_weight_is_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, count: int, what: str
) -> None:
    path = checkpoint("llama")
    load_quantized(path)
    before = threads(), descriptors()
    read: list[int] = []
    with monkeypatch.context() as patch:
        allow_mappings(patch, count)
        with pytest.raises(MemoryBudgetError, match=what + PREDICTED):
            load_quantized(path, progress=lambda done, _: read.append(done))
    assert not any(read)
    assert (threads(), descriptors()) == before
    load_quantized(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "quantload-memory",
            "the thread that watches memory could not be started: .*; the load had not been planned yet",
        ),
        ("quantload-compile_0", "the thread that gets kernels ready could not be started"),
        ("quantload-reader-0", r"thread 1 of the \d that read and quantize could not be started" + PREDICTED),
        ("quantload-cache-writer", "the thread that writes the cache could not be started" + PREDICTED),
    ],
)
def test_a_thread_that_is_refused_is_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, what: str
) -> None:
    path, start = checkpoint("llama"), threading.Thread.start
    load_quantized(path)
    before = threads(), descriptors()

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryBudgetError, match=what):
        load_quantized(path, options=LoadOptions(workers=2, cache=tmp_path / "cache"))
    assert (threads(), descriptors()) == before


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")], ids=repr)
def test_memory_that_runs_out_while_a_piece_is_quantized(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    path, what = checkpoint("llama"), "no memory for what a load needs beside its tensors"
    for closure in ("online.weight_loader.OnlineWeightLoader", "convert.closures.ExportingLoader"):
        for method in ("load_region", "load_experts"):
            monkeypatch.setattr(f"quantload.{closure}.{method}", refuse)
    with pytest.raises(MemoryBudgetError, match=what + PREDICTED):
        load_quantized(path)
    with pytest.raises(MemoryBudgetError, match=what + PREDICTED):
        convert_checkpoint(path, tmp_path / "out", "quark_mxfp4")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_kernel_without_huge_pages_loads_the_same_model(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class WithoutHugePages(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(errno.EINVAL, "Invalid argument")
            super().madvise(option)

    path, inputs = checkpoint(name), named(name)[0].inputs()
    want = logits(load_quantized(path), inputs)
    monkeypatch.setattr(mmap, "mmap", WithoutHugePages)
    monkeypatch.setattr(shortage, "HUGE_PAGE", 4096)  # asked for, however small the model is
    assert torch.equal(logits(load_quantized(path), inputs), want)


def test_pages_that_the_program_has_locked_do_not_end_a_load(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Locked(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            if option == mmap.MADV_DONTNEED:
                raise OSError(errno.EINVAL, "Invalid argument")
            super().madvise(option)

    monkeypatch.setattr(mmap, "mmap", Locked)
    assert load_quantized(checkpoint("llama")).load_report.layers
