"""A model of several ranks gets new weights on all of them: the slices of a fresh load, or incomplete everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from new_weights import changed_copy, load, pointers
from pretended import assert_slices, load_ranks, on_all
from quantload import QuantloadError, reload_weights
from quantload.errors import IncompleteModelError, NonFiniteWeightError, PolicyError, RankError
from safetensors.torch import load_file
from test_divided_loads import SCHEMES
from tiny import folder
from torch import Tensor

Part = tuple[str, Tensor, tuple[int, ...]]


@pytest.fixture
def moe(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of one model with experts, and different weights."""
    old = folder("qwen3_moe", tmp_path)
    return old, changed_copy(old, tmp_path / "new")


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def in_halves(tensors: dict[str, Tensor], rank: int) -> Iterator[Part]:
    """Each tensor in two runs of rows, which differ in length; a rank may ask for the next before another does."""
    for name, tensor in tensors.items():
        cut = tensor.shape[0] // 4 * 3 if tensor.dim() else 0
        for low, high in ((0, cut), (cut, tensor.shape[0])) if tensor.dim() else ():
            yield name, tensor[low:high], (low, *[0] * (tensor.dim() - 1))


def own_experts(tensors: dict[str, Tensor], rank: int) -> Iterator[tuple[str, Tensor]]:
    """Without those of the other rank."""
    theirs = [f".experts.{number}." for number in ((2, 3), (0, 1))[rank]]
    return ((name, tensor) for name, tensor in tensors.items() if not any(each in name for each in theirs))


def in_another_order(tensors: dict[str, Tensor], rank: int) -> Iterator[tuple[str, Tensor]]:
    return iter(list(tensors.items())[:: 1 - 2 * rank])


Give = Callable[[dict[str, Tensor], int], Iterable[Any]]


def check(folders: tuple[Path, Path], scheme: str, expert_parallel: bool, give: Give | None) -> None:
    parts = load_ranks(folders[0], scheme, 2, expert_parallel)
    where, tensors = [pointers(model) for model, _ in parts], tensors_of(folders[1])
    found = on_all(
        parts,
        lambda model, rank: reload_weights(model, folders[1] if give is None else give(tensors, rank), progress=False),
    )
    assert not any(isinstance(each, QuantloadError) for each in found), found
    assert_slices(load(folders[1], scheme), parts)
    assert [pointers(model) for model, _ in parts] == where
    for rank, (model, _) in enumerate(parts):
        report = model.load_report
        assert (report.state, report.rank, len(report.rank_bytes_read)) == ("complete", rank, 2)


@pytest.mark.parametrize(
    ("scheme", "expert_parallel", "give"),
    [
        ("fp8_per_tensor", False, None),
        ("fp8_per_tensor", False, in_halves),
        pytest.param("quark_mxfp4", False, in_another_order, marks=pytest.mark.slow),
        ("quark_mxfp4", True, own_experts),
    ],
)
def test_new_weights_are_the_slices_of_a_fresh_load(
    moe: tuple[Path, Path], scheme: str, expert_parallel: bool, give: Give | None
) -> None:
    check(moe, scheme, expert_parallel, give)


def test_each_rank_reads_its_own_part(moe: tuple[Path, Path]) -> None:
    parts = load_ranks(moe[0], "quark_mxfp4", 2)
    for report in on_all(parts, lambda model, _: reload_weights(model, moe[1], progress=False)):
        most = (report.checkpoint_bytes - report.replicated_bytes) / 2 + report.replicated_bytes
        assert report.bytes_read <= 1.05 * most
    parts = load_ranks(moe[0], "quark_mxfp4", 2, expert_parallel=True)
    for report in on_all(parts, lambda model, _: reload_weights(model, moe[1], partial=True)):
        assert report.bytes_read <= 0.8 * sum(tensor.nbytes for tensor in tensors_of(moe[1]).values())
    assert_slices(load(moe[1]), parts)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "few_kv_heads", "mixtral"])
def test_every_scheme(name: str, scheme: str, tmp_path: Path) -> None:
    old = folder(name, tmp_path)
    new = changed_copy(old, tmp_path / "new")
    for give in (None, in_halves, lambda tensors, _: tensors):
        check((old, new), scheme, False, give)


def incomplete(parts: Any) -> list[bool]:
    found = []
    for model, _ in parts:
        found.append(model.load_report.state == "incomplete")
        if found[-1]:
            with pytest.raises(IncompleteModelError):
                model(torch.ones(1, 2, dtype=torch.long))
    return found


@pytest.mark.parametrize("is_read", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_fails_on_one_rank_leaves_the_model_incomplete_on_all(
    moe: tuple[Path, Path], tmp_path: Path, is_read: bool
) -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"

    def with_nan(each: str, tensor: Tensor) -> Tensor:
        if each != name:
            return tensor
        tensor = tensor.clone()
        tensor[5, -1] = torch.nan  # in a column of the second rank
        return tensor

    bad = changed_copy(moe[0], tmp_path / "bad", with_nan)
    parts = load_ranks(moe[0], "fp8_per_tensor", 2)
    found = on_all(parts, lambda model, _: reload_weights(model, bad if is_read else tensors_of(bad), progress=False))
    assert [type(error) for error in found] == [RankError, NonFiniteWeightError]
    assert "rank 1 failed: " in str(found[0])
    assert name in str(found[0])
    assert incomplete(parts) == [True, True]
    found = on_all(parts, lambda model, _: reload_weights(model, moe[1], progress=False))
    assert not any(isinstance(each, QuantloadError) for each in found), found
    assert incomplete(parts) == [False, False]
    assert_slices(load(moe[1], "fp8_per_tensor"), parts)


def test_other_orders_are_an_error_where_scales_are_of_all_ranks(moe: tuple[Path, Path]) -> None:
    parts, tensors = load_ranks(moe[0], "fp8_per_tensor", 2), tensors_of(moe[1])
    found = on_all(parts, lambda model, rank: reload_weights(model, in_another_order(tensors, rank)))
    assert all(isinstance(error, (PolicyError, RankError)) for error in found), found
    assert any("were given tensors in different orders" in str(error) for error in found)
    assert incomplete(parts) == [True, True]


@pytest.mark.slow
def test_an_update_that_one_rank_gives_up_ends_that_of_all(moe: tuple[Path, Path], tmp_path: Path) -> None:
    from quantload.reload.update import WeightUpdate

    parts, tensors = load_ranks(moe[0], "quark_mxfp4", 2), tensors_of(moe[1])

    def update(model: Any, rank: int) -> None:
        with WeightUpdate(model) as update:
            update.load(tensors)
            if rank == 0:
                update.finish()

    with pytest.raises(PolicyError, match="an adapter is added to weights in one process"):
        reload_weights(parts[0][0], tensors, adapter=tmp_path)
    found = on_all(parts, update)
    assert str(found[0]) == "rank 1 failed: an update was given up before it was finished"
    assert incomplete(parts) == [True, True]


def partly(given: dict[str, Tensor], model: Any, _: int) -> None:
    reload_weights(model, given, partial=True)


def test_a_partial_update_that_does_not_repair_one_rank_repairs_none(moe: tuple[Path, Path]) -> None:
    name, tensors = "model.layers.0.mlp.experts.3.down_proj.weight", tensors_of(moe[1])
    parts, bad = load_ranks(moe[0], "quark_mxfp4", 2, expert_parallel=True), tensors[name].clone()
    bad[1, 1] = torch.inf
    norm = "model.norm.weight"
    for given, is_left in (({name: bad}, True), ({norm: tensors[norm]}, True), ({name: tensors[name]}, False)):
        on_all(parts, functools.partial(partly, given))
        assert incomplete(parts) == [is_left, is_left]
