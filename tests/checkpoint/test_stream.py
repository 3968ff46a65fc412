from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from quantload.checkpoint import StreamEntry, read_stream
from quantload.errors import CheckpointError
from torch import Tensor


def test_entries_come_one_at_a_time():
    made: list[str] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in "ab":
            made.append(name)
            yield name, torch.ones(3, 2, dtype=torch.bfloat16)

    entries = read_stream(weights())
    assert made == []
    first = next(entries)
    assert made == ["a"]
    assert (first.name, first.dtype, first.shape, first.nbytes) == ("a", torch.bfloat16, (3, 2), 12)
    assert [entry.name for entry in entries] == ["b"]


@pytest.mark.parametrize("chunk", [1, 16, 40, 10_000])
@pytest.mark.parametrize("multiple", [1, 4])
def test_pieces_cover_every_row_once_without_a_copy(chunk: int, multiple: int):
    tensor = torch.arange(10 * 4, dtype=torch.float32).reshape(10, 4)
    pieces = list(StreamEntry("a", tensor).pieces(chunk, multiple))
    assert torch.cat([view for *_, view in pieces]).equal(tensor)
    assert [start for start, *_ in pieces] == [0, *(stop for _, stop, _ in pieces[:-1])]
    assert all(start % multiple == 0 for start, *_ in pieces)
    assert all(view.nbytes <= max(chunk, multiple * 16) for *_, view in pieces)
    assert pieces[0][2].data_ptr() == tensor.data_ptr()


def test_scalars_and_empty_tensors():
    ((start, stop, view),) = StreamEntry("a", torch.tensor(5)).pieces(8)
    assert (start, stop, view.tolist()) == (0, 1, [5])
    assert list(StreamEntry("a", torch.empty(0, 7)).pieces(8)) == []
    ((start, stop, view),) = StreamEntry("a", torch.empty(3, 0)).pieces(8)
    assert (start, stop, view.shape) == (0, 3, (3, 0))


def test_gradients_stay_outside():
    (entry,) = read_stream([("a", torch.ones(2, requires_grad=True))])
    assert not entry.tensor.requires_grad


@pytest.mark.parametrize("item", [("a",), "ab", ("a", [1]), (1, torch.ones(1))])
def test_other_items_are_refused(item: object):
    with pytest.raises(CheckpointError, match=r"yields \(name, tensor\) pairs"):
        list(read_stream([item]))


def test_names_come_once():
    with pytest.raises(CheckpointError, match="'a' twice"):
        list(read_stream([("a", torch.ones(1)), ("a", torch.ones(1))]))
