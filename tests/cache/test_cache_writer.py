"""Finished tensors on their way to the files of an entry."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.cache import writer as writing
from quantload.cache.writer import TensorWriter
from quantload.checkpoint.writer import ShardPlan, TensorSpec, plan_shards
from safetensors.torch import load_file
from torch import Tensor

TENSORS = {
    "codes": torch.randint(0, 256, (300, 9000), dtype=torch.uint8),
    "scale": torch.tensor(3.5),
    "fp8": torch.randn(7, 3).to(torch.float8_e4m3fn),
    "norm": torch.randn(5).to(torch.bfloat16),
    "empty": torch.empty(0, 3),
}


def plans_of(tensors: dict[str, Tensor], max_bytes: int = 1 << 30) -> list[ShardPlan]:
    specs = ([TensorSpec(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in tensors.items())
    return plan_shards(specs, max_bytes)


def nothing() -> None: ...


def raising(error: BaseException) -> Callable[[], None]:
    def then() -> None:
        raise error

    return then


def write(folder: Path, tensors: dict[str, Tensor], order: list[str], max_bytes: int = 1 << 30) -> None:
    plans = plans_of(tensors, max_bytes)
    with TensorWriter(folder, plans) as writer:
        for name in order:
            writer.take({name: tensors[name]}, nothing)
        checksums = writer.finish()
    for plan in plans:
        data = (folder / plan.path).read_bytes()
        assert checksums[plan.path].differs(0, memoryview(data), lambda *_: bytearray()) is None


@settings(max_examples=10, deadline=None)
@given(st.permutations(list(TENSORS)))
def test_tensors_may_come_in_any_order(tmp_path_factory: pytest.TempPathFactory, order: list[str]) -> None:
    folder = tmp_path_factory.mktemp("entry")
    write(folder, TENSORS, order)
    read = load_file(folder / "model.safetensors")
    assert all(torch.equal(read[name].view(-1).view(torch.uint8), TENSORS[name].view(-1).view(torch.uint8))
               for name in TENSORS)  # fmt: skip
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()
    }


def test_several_files(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, list(TENSORS), max_bytes=100)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_comes_then_comes_after_the_bytes_were_taken(tmp_path: Path) -> None:
    """A kernel that rearranges codes in place, for one, does so after the canonical ones were written."""
    tensor = torch.full((1 << 20,), 7, dtype=torch.uint8)
    threads = []

    def rearrange() -> None:
        threads.append(threading.current_thread().name)
        tensor.fill_(9)

    with TensorWriter(tmp_path, plans_of({"a": tensor})) as writer:
        writer.take({"a": tensor}, rearrange)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.full_like(tensor, 7))
    assert threads == ["quantload-cache-writer"]


def test_what_is_written_is_dropped_from_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(writing, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync"))
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, count, advice: calls.append(f"drop {advice}"))
    write(tmp_path, {"a": torch.zeros(3 << 20, dtype=torch.uint8)}, ["a"])
    assert calls[:6] == ["sync", f"drop {os.POSIX_FADV_DONTNEED}"] * 3


def test_a_full_disk_is_said_at_the_end_and_the_load_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    done: list[str] = []
    with TensorWriter(tmp_path, plans_of(tensors)) as writer:

        def full(fd: int, data: memoryview, offset: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        for name, tensor in tensors.items():
            writer.take({name: tensor}, lambda name=name: done.append(name))  # type: ignore[misc]
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
    assert done == ["a", "b"]


def test_what_a_layer_raises_afterwards_ends_the_load(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with TensorWriter(tmp_path, plans_of(tensors)) as writer:
        writer.take({"a": tensors["a"]}, raising(ValueError("no such layout")))
        with pytest.raises(ValueError, match="no such layout"):
            writer.finish()
        with pytest.raises(ValueError, match="no such layout"):
            writer.take({"b": tensors["b"]}, nothing)


def test_a_tensor_that_never_came_is_an_error(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with TensorWriter(tmp_path, plans_of(tensors)) as writer:
        writer.take({"a": tensors["a"]}, nothing)
        with pytest.raises(RuntimeError, match=r"never handed to the cache: \['b'\]"):
            writer.finish()


def test_nothing_more_is_done_for_a_load_that_has_failed(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    begun, failed, done = threading.Event(), threading.Event(), list[str]()
    writer = TensorWriter(tmp_path, plans_of(tensors))

    def first() -> None:
        begun.set()
        failed.wait(60)
        done.append("a")

    def fail() -> None:
        """Once the load has given up, which it does before it waits for the thread."""
        while not writer._given_up:
            threading.Event().wait(0.001)
        failed.set()

    with contextlib.suppress(ZeroDivisionError), writer:
        writer.take({"a": tensors["a"]}, first)
        writer.take({"b": tensors["b"]}, lambda: done.append("b"))
        threading.Thread(target=fail).start()
        assert begun.wait(60)
        raise ZeroDivisionError
    assert done == ["a"]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with TensorWriter(tmp_path, plans_of(TENSORS)) as writer:
        writer.take({"scale": TENSORS["scale"]}, nothing)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path, plans_of(TENSORS))
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads
