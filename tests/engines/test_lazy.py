"""A lazy tensor must be what the tensor itself would be, whatever an engine does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.engines.arrivals import Arrivals
from quantload.engines.lazy import LazyTensor, capturing
from quantload.errors import RouteError
from torch import Tensor

MOVEMENTS = ("transpose", "narrow", "select", "slice", "chunk", "reshape", "flatten", "unsqueeze", "squeeze", "permute",
             "cat", "stack", "split", "clone", "contiguous", "cpu", "view_as", "movedim", "T", "unbind", "detach",
             "iter", "ellipsis", "step", "data")  # fmt: skip
OTHERS: list[Callable[[Tensor], Any]] = [
    lambda x: x + 1, lambda x: x.to(torch.float16), lambda x: x.float() * 2, lambda x: x.repeat_interleave(2, 0),
    lambda x: x[torch.tensor([0])], lambda x: x.expand(2, *x.shape), lambda x: torch.zeros_like(x),
    lambda x: x.new_ones(3), lambda x: -x, lambda x: x.sum(), lambda x: x.tolist(), lambda x: torch.equal(x, x),
    lambda x: torch.cat([x, torch.ones(x.shape, dtype=x.dtype)]), lambda x: x.type(), lambda x: x.clone().mul_(3),
    lambda x: x.double(), lambda x: x.numpy(force=True).tolist() if x.dtype != torch.bfloat16 else 0,
]  # fmt: skip


def lazy_of(*tensors: Tensor) -> list[Any]:
    arrivals = Arrivals()
    return [arrivals.wrap(each) for each in tensors]


def values(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.arange(count).to(dtype)


def moved(name: str, x: Any, draw: Callable[[int], int]) -> Any:
    """One movement, with numbers that `draw(n)` gives below n; the same ones give the same movement."""
    dims = x.dim()
    if name in ("clone", "contiguous", "cpu", "detach"):
        return getattr(x, name)()
    if name == "unsqueeze":
        return x.unsqueeze(draw(dims + 1))
    if dims == 0 or name == "data":
        return x.data
    dim = draw(dims)
    size = x.shape[dim]
    if name == "transpose":
        return x.transpose(dim, draw(dims))
    if name == "T":
        return x.T if dims == 2 else x
    if name == "narrow":
        start = draw(size)
        return x.narrow(dim, start, draw(size - start) + 1)
    if name == "select":
        return x.select(dim, draw(size) - size)
    if name == "slice":
        start = draw(size)
        return x[(slice(None),) * dim + (slice(start, start + 1 + draw(size)),)]
    if name == "step":
        return x[:: draw(2) + 1]
    if name == "ellipsis":
        return x[..., draw(x.shape[-1])]
    if name == "chunk":
        parts: Any = torch.chunk(x, draw(3) + 1, dim)
        return parts[draw(len(parts))]
    if name == "split":
        cut = draw(size)
        return x.split([cut, size - cut], dim)[1]
    if name in ("unbind", "iter"):
        parts = list(x) if name == "iter" else x.unbind(dim)
        return parts[draw(len(parts))]
    if name == "flatten":
        return x.flatten(draw(dims))
    if name == "reshape":
        return x.reshape(-1, x.shape[-1])
    if name == "view_as":
        return x.reshape(-1).view_as(torch.empty(x.numel(), 1))
    if name == "squeeze":
        return x.squeeze()
    if name == "permute":
        return x.permute(*[(dim + i) % dims for i in range(dims)])
    if name == "movedim":
        return x.movedim(dim, 0)
    return (torch.cat if name == "cat" else torch.stack)([x, x], dim)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
@settings(max_examples=150, deadline=None)
def test_movements_read_nothing_and_give_what_they_give_of_data(shape: list[int], data: st.DataObject) -> None:
    real = values(torch.Size(shape).numel()).reshape(shape)
    (lazy,) = lazy_of(real)
    lazy.origin.read = None  # whoever reads fails
    for name in data.draw(st.lists(st.sampled_from(MOVEMENTS), max_size=5)):
        seed = data.draw(st.integers(0, 1 << 20))
        if name == "step" and len(lazy.boxes) > 1:
            continue  # which is no movement of boxes: it is read

        def draw(below: int, seed: int = seed) -> int:
            return seed % below

        try:
            real = moved(name, real, draw)
        except (RuntimeError, IndexError) as error:
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                moved(name, lazy, draw)
            del error
            return
        if real.numel() == 0 or real.numel() > 4096:
            return
        lazy = moved(name, lazy, draw)
        assert type(lazy) is LazyTensor
        assert (lazy.shape, lazy.dtype, lazy.device) == (real.shape, real.dtype, real.device)
    target = torch.full(real.shape, -1, dtype=real.dtype)
    assert target.copy_(lazy) is target
    assert torch.equal(target, real)


@pytest.mark.parametrize("number", range(len(OTHERS)))
@pytest.mark.parametrize("captured", [False, True])
def test_what_is_no_movement_is_carried_out_on_what_it_stands_for(number: int, captured: bool) -> None:
    real, operation = values(12).reshape(3, 4), OTHERS[number]
    (lazy,) = lazy_of(real.clone())
    want, got = operation(real[1:].T), operation(lazy[1:].T)
    if captured:
        with capturing():
            got = operation(lazy[1:].T)
    if isinstance(want, Tensor):
        target = torch.empty(want.shape, dtype=want.dtype)
        target.copy_(got)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        got = target
        assert torch.equal(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_dtype_reads_nothing(dtype: torch.dtype) -> None:
    real = values(12).reshape(3, 4)
    (lazy,) = lazy_of(real)
    wide = lazy.to(dtype)[1:]
    assert type(wide) is LazyTensor
    assert wide.dtype == dtype
    target = torch.empty(2, 4, dtype=dtype)
    target.copy_(wide)
    assert torch.equal(target, real.to(dtype)[1:])


def test_parts_of_a_tensor_are_written_where_python_says() -> None:
    real = values(12).reshape(3, 4)
    (lazy,) = lazy_of(real)
    target = torch.zeros(5, 4)
    target[1:4] = lazy
    target[0, :2] = lazy[0, 2:]
    target[4][None] = lazy[:1]
    assert torch.equal(target, torch.cat([torch.tensor([[2.0, 3, 0, 0]]), real.float(), real[:1].float()]))
    by_index = torch.zeros(5, 4, dtype=torch.bfloat16)
    by_index[torch.tensor([4, 0, 2])] = lazy
    assert torch.equal(by_index[[4, 0, 2]], real)


def test_a_copy_broadcasts_and_refuses_as_torch_does() -> None:
    (lazy,) = lazy_of(values(4))
    shape: tuple[int, ...]
    for shape in ((3, 4), (1, 1, 4)):
        assert torch.equal(torch.zeros(shape).copy_(lazy), torch.zeros(shape).copy_(values(4)))
    for shape in ((3,), (4, 3)):
        with pytest.raises(RuntimeError):
            torch.zeros(shape).copy_(lazy)


def test_changes_in_place_are_seen_by_who_copies_later_and_refused_for_parts() -> None:
    real = values(12).reshape(3, 4)
    (lazy,) = lazy_of(real.clone())
    for part in (lazy[1:], lazy.T, lazy.view(12)):
        with pytest.raises(RouteError, match="would change a part of a checkpoint tensor in place"):
            part.add_(1)
    fresh = torch.cat([lazy, lazy])
    fresh[0] = 7
    assert torch.equal(torch.zeros(6, 4).copy_(fresh)[0], torch.full((4,), 7.0))
    assert lazy.add_(1) is lazy
    lazy *= 2
    assert torch.equal(torch.zeros(3, 4).copy_(lazy), ((real + 1) * 2).float())
    assert torch.equal(torch.zeros(2, 4).copy_(lazy[1:]), ((real + 1) * 2)[1:].float())


def test_copies_into_meta_tensors_are_noted_whatever_was_done_before() -> None:
    first, second, third = lazy_of(values(12).reshape(3, 4), values(4).reshape(1, 4), values(12).reshape(3, 4))
    shadow = torch.empty(4, 4, device="meta")
    with capturing() as copies:
        shadow.narrow(0, 0, 3).copy_(first)
        shadow[3:] = second * 2
        with capturing() as inner:
            shadow[0].copy_(second[0])
        third.mul_(2)
        shadow[:3].copy_(third)
    assert [(copy.target.storage_offset(), tuple(copy.target.shape)) for copy in copies] == [
        (0, (3, 4)), (12, (1, 4)), (0, (3, 4)),
    ]  # fmt: skip
    assert len(inner) == 1
    for copy, want in zip(copies, (values(12), values(4) * 2, values(12) * 2), strict=True):
        assert torch.equal(torch.empty(want.shape).copy_(copy.source.reshape(-1)), want.float())
    shadow.copy_(torch.cat([first, second]))  # who only counts
    assert len(copies) == 3


def test_a_parameter_made_of_one_can_be_computed_with() -> None:
    (lazy,) = lazy_of(values(4, torch.float32))
    parameter = torch.nn.Parameter(lazy, requires_grad=False)
    assert torch.equal(parameter * 2, values(4, torch.float32) * 2)
    other = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # which torch does not let us answer
        other.data = lazy


def test_it_says_what_it_is() -> None:
    (lazy,) = lazy_of(values(12).reshape(3, 4))
    assert f"{lazy[1:]}" == repr(lazy[1:]) == "LazyTensor([2, 4], torch.bfloat16, 1 boxes)"
