"""Final storage: own storages, alignment, and pages that go back when a load fails."""

from __future__ import annotations

import math

import psutil
import pytest
import torch
from quantload.online import storage
from quantload.online.storage import ALIGNMENT, SLAB_BYTES, FinalStorage

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
    final, real = FinalStorage(CPU), storage._map
    sizes: list[int] = []

    def noted(nbytes: int) -> object:
        sizes.append(nbytes)
        return real(nbytes)

    monkeypatch.setattr(storage, "_map", noted)
    tensors = [final.empty((MIB - 4096,), torch.uint8) for _ in range(20)]
    assert sizes == [MIB, MIB, 2 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB]
    tensors += [final.empty((4096,), torch.uint8) for _ in range(7)]
    assert len(sizes) == 7
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


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
