"""Coordinates must move exactly as data does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.model.boxes import Box
from quantload.model.coordinates import Coordinates, NotExpressible

Operation = Callable[..., torch.Tensor]


def gather(x: Coordinates, sources: list[torch.Tensor]) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        out = torch.full(tuple(x.shape), -1)
    for box in x.boxes:
        values = torch.as_strided(sources[box.source].flatten(), box.shape, box.strides, box.offset)
        out[tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))] = values
    return out


def check(operation: Operation, *shapes: tuple[int, ...]) -> None:
    sources, at = [], 0
    for shape in shapes:
        n = torch.Size(shape).numel()
        sources.append(torch.arange(at, at + n).reshape(shape))
        at += n
    expected = operation(*sources)
    moved = operation(*(Coordinates.of(i, t.shape, t.dtype) for i, t in enumerate(sources)))
    assert isinstance(moved, Coordinates)
    assert torch.equal(gather(moved, sources), expected)


OPERATIONS: list[tuple[Operation, list[tuple[int, ...]]]] = [
    (lambda a, b: torch.cat([a, b], dim=1), [(3, 4), (3, 2)]),
    (lambda a, b: torch.stack([a, b], dim=-1), [(3, 4), (3, 4)]),
    (lambda a: a.transpose(0, 2).contiguous(), [(2, 3, 4)]),
    (lambda a: a.T, [(3, 4)]),
    (lambda a: a.permute(2, 0, 1), [(2, 3, 4)]),
    (lambda a: torch.chunk(a, 3, dim=0)[1].clone(), [(9, 2)]),
    (lambda a: torch.split(a, [2, 5], dim=1)[1], [(3, 7)]),
    (lambda a: a.reshape(4, 2, 5).transpose(0, 1).reshape(8, 5), [(8, 5)]),
    (lambda a: a.reshape(2, 4, 5).transpose(0, 1).reshape(8, 5), [(8, 5)]),
    (lambda a: a.view(2, 3, 2, 7).transpose(1, 2).reshape(12, 7), [(12, 7)]),
    (lambda a: a.view(3, 4).transpose(0, 1).reshape(12), [(12,)]),
    (lambda a: a[:, 1::2], [(4, 6)]),
    (lambda a, b: a.view_as(b).transpose(0, 1), [(3, 4), (2, 6)]),
    (lambda a: a.transpose(0, 1).reshape_as(torch.empty(2, 6)), [(3, 4)]),
    (lambda a: a.select(-1, -2), [(2, 3, 4)]),
    (lambda a: a.movedim((0, 1), (2, 0)), [(2, 3, 4)]),
    (lambda a: torch.moveaxis(a, -1, 0), [(2, 3, 4)]),
    (lambda a: a.narrow(0, -3, 2)[-1], [(4, 6)]),
    (lambda a: a[1], [(4, 6)]),
    (lambda a: a[..., None, 2:4], [(4, 6)]),
    (lambda a: a.flatten(1), [(2, 3, 4)]),
    (lambda a: a.unflatten(0, (2, 3)), [(6, 4)]),
    (lambda a: a.reshape(6, 1, 4).squeeze(1), [(6, 4)]),
    (lambda a, b: torch.cat([torch.stack([a, a]), torch.stack([b, b])], dim=1), [(2, 3), (4, 3)]),
    (lambda a, b: torch.cat([a, b]).reshape(2, 3, 4), [(3, 4), (3, 4)]),
    (lambda a, b: torch.cat([a, b]).unbind(0)[4], [(3, 4), (3, 4)]),
]


@pytest.mark.parametrize(("operation", "shapes"), OPERATIONS)
def test_moves_as_data_does(operation: Operation, shapes: list[tuple[int, ...]]) -> None:
    check(operation, *shapes)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.permutations([0, 1, 2]), st.permutations([0, 1, 2]))
def test_reshape_of_any_permutation(a: int, b: int, c: int, first: list[int], second: list[int]) -> None:
    check(lambda x: x.permute(first).reshape(a * b, c).reshape(c, a, b).permute(second).reshape(-1), (a, b, c))


@pytest.mark.parametrize("operation", [lambda a: a + 1, lambda a: a.to(torch.float64), lambda a: a[[0, 1]]])
def test_arithmetic_is_refused(operation: Operation) -> None:
    with pytest.raises(NotExpressible):
        operation(Coordinates.of(0, (4, 4), torch.float32))


def test_a_box_across_a_reshaped_border_is_cut() -> None:
    check(lambda a, b: torch.cat([a, b]).reshape(3, 2), (3,), (3,))
    check(lambda a, b: torch.cat([a, b]).reshape(2, 3, 4).transpose(0, 2), (7,), (17,))


def test_too_many_boxes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantload.model.coordinates.MAX_BOXES", 8)
    with pytest.raises(NotExpressible, match="8 boxes"):
        Coordinates.of(0, (2, 16), torch.float32).T.reshape(32)


@pytest.mark.parametrize(
    "operation",
    [lambda a: a[4], lambda a: a[:, -7], lambda a: a.narrow(0, 2, 3), lambda a: a.select(1, 6), lambda a: a.unbind(2)],
)
def test_what_is_out_of_range_for_data_is_out_of_range(operation: Operation) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        operation(torch.empty(4, 6))
    with pytest.raises(IndexError):
        operation(Coordinates.of(0, (4, 6), torch.float32))


def test_a_subclass_stays_what_it_is_and_hands_on_what_it_knows() -> None:
    class Named(Coordinates):
        called: str

        def moved(self, shape: Sequence[int], boxes: list[Box]) -> Self:
            new = super().moved(shape, boxes)
            new.called = self.called
            return new

    x = Named.of(0, (4, 6), torch.float32)
    x.called = "w"
    moved = torch.cat([x.T[2:], x.chunk(2)[0].reshape(4, 3)[:, :3].movedim(0, 1).contiguous().reshape(3, 4)])
    assert type(moved) is Named
    assert moved.called == "w"


def test_it_can_be_printed() -> None:
    moved = torch.cat([Coordinates.of(0, (2, 3), torch.float32), Coordinates.of(1, (4, 3), torch.float32)])
    assert repr(moved) == "Coordinates([6, 3], torch.float32, 2 boxes)"
    assert str([moved]) == f"[{moved!r}]"
