"""Final storage: own storages, alignment, and pages that go back when a load fails."""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import os
import random
from collections import Counter
from typing import Any

import psutil
import pytest
import torch
from quantload.errors import MemoryBudgetError
from quantload.online import storage
from quantload.online.storage import ALIGNMENT, SLAB_BYTES, FinalStorage
from quantload.shortage import map_anonymous

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 1, 3), (129,)])
def test_shape_dtype_and_alignment(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    final = FinalStorage(CPU)
    final.empty((1,), torch.uint8)  # what comes next does not begin at an aligned offset by itself
    tensor = final.empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.data_ptr() % ALIGNMENT == 0
    assert final.bytes == 1 + math.prod(shape) * dtype.itemsize


def test_tensors_do_not_overlap_and_have_storages_of_their_own() -> None:
    final = FinalStorage(CPU)
    sizes = [1, 63, 64, 65, 1000, 3]
    tensors = [final.empty((size,), torch.uint8) for size in sizes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    for number, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert (tensor == number + 1).all()
        assert tensor.untyped_storage().nbytes() == size
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(sizes)


def test_a_tensor_without_elements() -> None:
    assert FinalStorage(CPU).empty((0, 4), torch.float32).shape == (0, 4)


def test_a_tensor_larger_than_a_slab_gets_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SLAB_BYTES", MIB)
    final = FinalStorage(CPU)
    small, large, after = (final.empty((n,), torch.uint8) for n in (10, 3 * MIB, 10))
    for tensor, value in ((small, 1), (large, 2), (after, 3)):
        tensor.fill_(value)
    assert (int(small.sum()), int(large[-1]), int(after.sum())) == (10, 2, 30)


def test_mappings_grow_and_what_is_left_in_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SLAB_BYTES", MIB)
    monkeypatch.setattr(storage, "MAX_SLAB_BYTES", 4 * MIB)
    final, sizes = FinalStorage(CPU), mapped_sizes(monkeypatch)
    tensors = [final.empty((MIB - 4096,), torch.uint8) for _ in range(20)]
    assert sizes == [MIB, MIB, 2 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB]
    tensors += [final.empty((4096,), torch.uint8) for _ in range(7)]
    assert len(sizes) == 7
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def mapped_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all mappings that are made from now on."""
    real, sizes = map_anonymous, list[int]()

    def noted(nbytes: int, what: str) -> mmap.mmap:
        sizes.append(nbytes)
        return real(nbytes, what)

    monkeypatch.setattr(storage, "map_anonymous", noted)
    return sizes


def test_expected_tensors_get_mappings_of_exactly_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_SLAB_BYTES", 4 * MIB)
    final, sizes = FinalStorage(CPU), mapped_sizes(monkeypatch)
    expected = Counter({5 * MIB: 1, MIB: 7, 100: 3, 0: 2, 64: 1})
    final.expect(expected)
    assert sizes == [5 * MIB, 4 * MIB, 3 * MIB + 3 * 128 + 64]
    asked = [*expected.elements()]
    random.Random(0).shuffle(asked)
    tensors = [final.empty((nbytes,), torch.uint8) for nbytes in asked]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
    assert len(sizes) == 3
    final.empty((100,), torch.uint8).fill_(1)  # one more than was expected
    assert sizes[3:] == [SLAB_BYTES]


def allow_mappings(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The system gives so many mappings, and no more."""
    real, given = mmap.mmap, itertools.count(1)

    def limited(*arguments: Any, **named: Any) -> mmap.mmap:
        if next(given) > count:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*arguments, **named)

    monkeypatch.setattr(mmap, "mmap", limited)


def test_memory_of_expected_tensors_is_refused_before_any_of_them_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_SLAB_BYTES", 8 * MIB)
    allow_mappings(monkeypatch, 1)
    message = rf"no memory for the tensors of the model, part 2 of 2 \({4 * MIB} bytes\): Cannot allocate memory"
    with pytest.raises(MemoryBudgetError, match=message):
        FinalStorage(CPU).expect({8 * MIB: 1, 4 * MIB: 1})


def test_an_unexpected_tensor_gets_no_more_than_it_needs_where_no_more_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, real = list[int](), map_anonymous

    def only_small(nbytes: int, what: str) -> mmap.mmap:
        sizes.append(nbytes)
        if nbytes > MIB:
            raise MemoryBudgetError(what)
        return real(nbytes, what)

    monkeypatch.setattr(storage, "map_anonymous", only_small)
    final = FinalStorage(CPU)
    final.empty((1000,), torch.uint8).fill_(1)
    assert sizes == [SLAB_BYTES, 1000]
    with pytest.raises(MemoryBudgetError, match="a tensor of the model"):
        final.empty((2 * MIB,), torch.uint8)


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOSYS])
def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    class WithoutHugePages(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(mmap, "mmap", WithoutHugePages)
    final = FinalStorage(CPU)
    final.expect({4 * MIB: 1})
    tensor = final.empty((4 * MIB,), torch.uint8).fill_(3)
    assert int(tensor[-1]) == 3
    final.discard()  # what cannot be given back stays until the tensor goes
    assert int(tensor[0]) == 3


def test_tensors_outlive_the_storage_object() -> None:
    final = FinalStorage(CPU)
    tensor = final.empty((1000,), torch.int32)
    tensor.copy_(torch.arange(1000))
    del final
    assert torch.equal(tensor, torch.arange(1000, dtype=torch.int32))


def rss() -> int:
    return int(psutil.Process().memory_info().rss)


def test_nothing_is_resident_before_it_is_written_and_a_failure_gives_everything_back() -> None:
    before = rss()
    size = 64 * MIB
    final = FinalStorage(CPU)
    tensor = final.empty((size,), torch.uint8)
    assert rss() - before < size // 2
    tensor.fill_(1)
    assert rss() - before > size * 0.9
    with pytest.raises(RuntimeError, match="stop"), final:
        raise RuntimeError("stop")
    assert rss() - before < size // 4  # although `tensor` still refers to it
    assert tensor[0] == 0


def test_success_keeps_what_was_written() -> None:
    with FinalStorage(CPU) as final:
        tensor = final.empty((100,), torch.uint8)
        tensor.fill_(7)
    assert (tensor == 7).all()


def test_after_a_discard_new_tensors_come_from_a_new_mapping() -> None:
    final = FinalStorage(CPU)
    old = final.empty((100,), torch.uint8)
    final.discard()
    new = final.empty((100,), torch.uint8)
    new.fill_(5)
    assert (old == 0).all()


def test_one_slab_serves_many_tensors() -> None:
    final = FinalStorage(CPU)
    first = final.empty((1000,), torch.uint8)
    second = final.empty((1000,), torch.uint8)
    assert 0 < second.data_ptr() - first.data_ptr() < SLAB_BYTES
