"""Small stored weights that become something else: in bundles, and the bytes that single ones leave."""

from __future__ import annotations

import pytest
import torch
from quantload.errors import NonFiniteWeightError
from stored_experts import EXPERTS, HIDDEN, INTERMEDIATE, ORDERS, StoredExperts

SLABS = 20_000
"""Pieces too small for a bundle: every weight on its own."""


@pytest.mark.parametrize("chunk_bytes", [1 << 23, 300_000])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("mxfp4", "fp8_channel"), ("fp8_block", "mxfp4"), ("fp8_tensor", "fp8_block"), ("fp8_block", "fp8_tensor")],
)
def test_bundles_leave_the_bytes_that_single_weights_leave(
    stored: str, wanted: str, order: str, chunk_bytes: int
) -> None:
    bundled, single = StoredExperts(stored, wanted, order), StoredExperts(stored, wanted, order)
    bundled.load(chunk_bytes)
    single.load(SLABS)
    assert bundled.finished == single.finished == 1
    assert all(map(torch.equal, bundled.bytes(), single.bytes()))


def test_what_lies_together_is_one_piece_and_what_is_alike_is_quantized_in_one_call() -> None:
    experts = StoredExperts("mxfp4", "mxfp8", "codes beside scales")
    pieces = experts.load()
    values = 3 * EXPERTS * INTERMEDIATE * HIDDEN * 4
    assert len(pieces) == -(-values // (4 << 20))
    assert all(piece.after is None for piece in pieces)
    assert sum(piece.nbytes for piece in pieces) == experts.size
    assert len(experts.calls) <= 3 * len(pieces)


def test_scales_that_lie_apart_come_first_and_are_held() -> None:
    experts = StoredExperts("fp8_block", "mxfp4", "scales first")
    pieces = experts.load()
    scales, codes = pieces[0::2], pieces[1::2]
    assert len(scales) == len(codes) == 2
    assert all(first.signal is second.after is not None for first, second in zip(scales, codes, strict=True))
    plan = experts.plan()
    assert plan.held_bytes == max(piece.nbytes for piece in scales)
    assert plan.scratch_bytes <= 4 << 20


@pytest.mark.parametrize("order", ["by text", "scales first"])
def test_a_scale_that_is_not_finite_is_named_by_its_own_tensor(order: str) -> None:
    experts = StoredExperts("fp8_block", "mxfp4", order)
    experts.tensors["down", 7, "scale"][1, 0] = torch.inf
    with pytest.raises(NonFiniteWeightError, match=r"down\.7\.scale: a scale is NaN or infinite"):
        experts.load()
