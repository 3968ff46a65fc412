"""Two checkpoints of one model, with different weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload import LoadReport, load_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAME = ("quantization", "device", "kept", "final_bytes", "checkpoint_bytes", "initialized", "unexpected", "state")
Changed = Callable[[str, Tensor], Tensor]


def other_values(name: str, tensor: Tensor) -> Tensor:
    """Values with another magnitude in every row, so that no code and no scale stays what it was by chance."""
    if not tensor.is_floating_point():
        return tensor
    rows = tensor.shape[0] if tensor.dim() else 1
    factors = torch.linspace(0.4, 1.9, rows).reshape(-1, *[1] * max(tensor.dim() - 1, 0))
    return (tensor.float() * factors).to(tensor.dtype).reshape(tensor.shape)


def changed_copy(folder: Path, target: Path, change: Changed = other_values) -> Path:
    """A copy of a checkpoint in one file or several, each tensor of which is what `change` makes of it."""
    target.mkdir()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def load(folder: Path, scheme: str = "quark_mxfp4", **more: Any) -> Any:
    """The model of a folder."""
    return load_quantized(folder, scheme, progress=False, **more)


def check_facts(report: LoadReport, other: LoadReport) -> None:
    """What two reports say is the same, but for times and for the memory that was there before.

    Sums of squares are of single precision within a piece, and so depend on how a layer was cut.
    """
    for name in SAME:
        assert getattr(report, name) == getattr(other, name), name
    assert len(report.layers) == len(other.layers)
    for mine, its in zip(report.layers, other.layers, strict=True):
        assert replace(mine, sqnr_db=None) == replace(its, sqnr_db=None)
        assert mine.sqnr_db == pytest.approx(its.sqnr_db, abs=1e-3, nan_ok=True), mine.name


def pointers(model: nn.Module) -> dict[str, int]:
    """Where each tensor of a model lies."""
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def different(model: nn.Module, other: nn.Module) -> list[str]:
    """Tensors that are not the same bytes in two models; those that only one of them has too."""
    mine, theirs = model.state_dict(), other.state_dict()
    return [
        name
        for name in {**mine, **theirs}
        if name not in mine or name not in theirs or not _same(mine[name], theirs[name])
    ]


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), two.contiguous().reshape(-1).view(torch.uint8)
    )
