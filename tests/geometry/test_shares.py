"""What each rank has of a dimension."""

from __future__ import annotations

import pytest
import torch
from quantload.geometry.shares import Share, even_share, repeated_share
from quantload.model.coordinates import Coordinates


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_have_every_element_once_and_as_much_of_each_part(parts: int, ranks: int) -> None:
    size = parts * ranks * 5
    shares = [even_share(0, size, rank, ranks, parts) for rank in range(ranks)]
    elements = torch.arange(size)
    had = [share.of(elements) for share in shares if share is not None]
    assert sorted(torch.cat(had).tolist()) == elements.tolist()
    for own in had:
        of_parts = torch.bincount(own // (size // parts), minlength=parts)
        assert of_parts.tolist() == [5] * parts


def test_what_cannot_be_divided_evenly_is_not_divided() -> None:
    assert even_share(0, 10, 0, 4) is None
    assert even_share(0, 12, 0, 4, parts=2) is None  # 12 / 4, but not 6 / 4


def test_heads_that_are_fewer_than_ranks_are_had_whole_by_neighbours() -> None:
    heads = torch.arange(2).repeat_interleave(8)
    shares = [repeated_share(0, 16, 2, rank, 4) for rank in range(4)]
    assert [share.of(heads).tolist() for share in shares if share] == [[0] * 8, [0] * 8, [1] * 8, [1] * 8]
    assert repeated_share(0, 24, 3, 0, 4) is None


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_coordinates_are_divided_as_tensors_are(dim: int) -> None:
    shape = (4, 6, 8)
    share = Share(dim, shape[dim], ((0, 1), (2, 4)))
    whole = torch.arange(4 * 6 * 8).view(shape)
    part = share.of(Coordinates.of(0, shape, whole.dtype))
    made = torch.full(share.of(whole).shape, -1)
    for box in part.boxes:  # type: ignore[attr-defined]
        window = made[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))]
        window.copy_(whole.flatten().as_strided(box.shape, box.strides, box.offset))
    assert torch.equal(made, share.of(whole))
