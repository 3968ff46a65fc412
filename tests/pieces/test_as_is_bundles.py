"""Small tensors of weights that stay as stored: few pieces, few calls, and every byte where it belongs."""

from __future__ import annotations

import pytest
import torch
from quantload.errors import CheckpointError, NonFiniteWeightError
from quantload.pieces.stored_stacks import MAX_HOLE
from stored_experts import EXPERTS, HIDDEN, INTERMEDIATE, ORDERS, StoredExperts


@pytest.mark.parametrize("chunk_bytes", [1 << 23, 100_000, 5000])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["mxfp4", "fp8_block", "fp8_tensor"])
def test_every_expert_is_as_it_is_stored(name: str, order: str, chunk_bytes: int) -> None:
    experts = StoredExperts(name, name, order)
    experts.load(chunk_bytes)
    assert experts.finished == 1
    codes, scales = experts.stacked("codes"), experts.stacked("scale")
    assert all(map(torch.equal, experts.bytes(), (codes[0], scales[0], codes[1], scales[1])))


def test_a_layer_is_as_many_pieces_as_its_bytes_need_and_each_has_a_call_for_what_is_alike() -> None:
    experts = StoredExperts("mxfp4", "mxfp4", "codes beside scales")
    pieces = experts.load()
    assert sum(piece.nbytes for piece in pieces) == experts.size
    assert len(pieces) == 1
    rows = [(EXPERTS, HIDDEN, INTERMEDIATE // 2), (EXPERTS, INTERMEDIATE, HIDDEN // 2)]
    blocks = [(EXPERTS, HIDDEN, INTERMEDIATE // 32), (EXPERTS, INTERMEDIATE, HIDDEN // 32)]
    assert sorted(experts.calls) == sorted([rows[0], blocks[0], *2 * rows[1:], *2 * blocks[1:]])


def test_scales_that_lie_apart_are_read_together() -> None:
    experts = StoredExperts("fp8_block", "fp8_block", "scales first")
    pieces = experts.load()
    assert [piece.extents[0][0] for piece in pieces] == sorted(piece.extents[0][0] for piece in pieces)
    scales = sum(entry.nbytes for (_, _, role), entry in experts.entries.items() if role == "scale")
    assert pieces[0].nbytes > scales  # with codes behind them


@pytest.mark.parametrize(("hole", "pieces"), [(MAX_HOLE, 1), (MAX_HOLE + 1, 2 * 3 * EXPERTS)])
def test_a_few_bytes_that_nothing_needs_are_read_over(hole: int, pieces: int) -> None:
    experts = StoredExperts("fp8_tensor", "fp8_tensor", "codes beside scales", hole)
    assert len(experts.load(1 << 23)) == max(pieces, -(-experts.size // (1 << 20)))
    assert experts.finished == 1


@pytest.mark.parametrize("key", [("gate", 0), ("down", 7), ("up", 11)])
def test_a_code_that_is_nan_is_named_by_its_own_tensor(key: tuple[str, int]) -> None:
    experts = StoredExperts("fp8_block", "fp8_block", "by text")
    experts.tensors[*key, "codes"].view(torch.uint8)[5, 3] = 0x7F
    with pytest.raises(NonFiniteWeightError, match=rf"{key[0]}\.{key[1]}\.codes: a code is NaN"):
        experts.load()


@pytest.mark.parametrize("wanted", ["fp8_tensor", "mxfp4"])
def test_a_zero_point_that_is_not_zero_is_named_by_its_own_tensor(wanted: str) -> None:
    StoredExperts("fp8_tensor", wanted, "by text", zeros=True).load()
    experts = StoredExperts("fp8_tensor", wanted, "by text", zeros=True)
    experts.tensors["up", 9, "must_be_zero"][0] = -1
    with pytest.raises(CheckpointError, match=r"up\.9\.must_be_zero is not zero everywhere"):
        experts.load()


@pytest.mark.parametrize("chunk_bytes", [1 << 23, 5000])
@pytest.mark.parametrize("order", ["by text", "scales first"])
@pytest.mark.parametrize("wanted", ["fp8_tensor", "mxfp4"])
def test_a_shape_that_is_another_is_compared_with_the_codes_beside_it(
    wanted: str, order: str, chunk_bytes: int
) -> None:
    StoredExperts("fp8_tensor", wanted, order, shapes=True).load(chunk_bytes)
    experts = StoredExperts("fp8_tensor", wanted, order, shapes=True)
    experts.tensors["up", 9, "shape"][0] += 1
    message = r"up\.9\.shape says \[129, 256\], but up\.9\.codes and its scales are those of a weight of \[128, 256\]"
    with pytest.raises(CheckpointError, match=message):
        experts.load(chunk_bytes)
