"""What very many tensors and pieces take beyond the allowance."""

from __future__ import annotations

from quantload.memory.overhead import Objects


def test_only_what_the_allowance_does_not_cover_is_counted() -> None:
    objects = Objects(covered=3, nbytes=10)
    assert [objects.beyond(count) for count in (0, 3, 4, 6)] == [0, 0, 10, 30]
