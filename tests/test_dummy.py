"""Models without their weights: everything else is that of a real load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from quantload import convert_checkpoint, load_quantized
from quantload.checkpoint.headers import DTYPES, TensorEntry
from quantload.checkpoint.index import CheckpointIndex, Shard
from quantload.dummy import MadeUp
from quantload.errors import PolicyError


def load(folder: Path, scheme: str, weights: Any = "dummy") -> Any:
    return load_quantized(folder, scheme, progress=False, weights=weights)


def described(model: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def all_bytes(model: Any) -> list[bytes]:
    return [
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values()
    ]


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [("qwen3_moe", "fp8_per_tensor"), ("llama_tied", "quark_mxfp4")],
)
def test_a_dummy_has_the_memory_and_the_kernels_of_the_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, architecture: str, scheme: str
) -> None:
    folder = checkpoint(architecture)
    shutil.copy(folder / "config.json", tmp_path)
    real, inputs = load(folder, scheme, "checkpoint"), architectures.BY_NAME[architecture].inputs()
    kernels = [(layer.name, layer.kernel, layer.bytes_out) for layer in real.load_report.layers]
    for made in (folder, tmp_path):
        model = load(made, scheme)
        assert described(model) == described(real)
        assert [(layer.name, layer.kernel, layer.bytes_out) for layer in model.load_report.layers] == kernels
        assert model.load_report.final_bytes == real.load_report.final_bytes
        assert model.load_report.model == f"{made} (dummy weights)"
        assert torch.isfinite(architectures.logits(model, inputs)).all()
        assert all_bytes(model) == all_bytes(load(made, scheme)) != all_bytes(real)


@pytest.mark.parametrize(
    ("scheme", "exported"),
    [("quark_mxfp4", "quark"), ("fp8_per_block", "compressed-tensors"), ("nvfp4", "modelopt")],
)
def test_a_dummy_of_a_quantized_checkpoint(
    checkpoint: Callable[[str], Path], tmp_path: Path, scheme: str, exported: Any
) -> None:
    folder = tmp_path / "quantized"
    convert_checkpoint(checkpoint("llama"), folder, scheme, format=exported, progress=False)
    model, real = load(folder, "auto"), load(folder, "auto", "checkpoint")
    assert described(model) == described(real)
    assert all_bytes(model) != all_bytes(real)
    assert torch.isfinite(architectures.logits(model, architectures.BY_NAME["llama"].inputs())).all()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point], ids=str)
@pytest.mark.parametrize("kind", ["values", "codes", "scale"])
def test_what_is_made_up_is_finite_and_the_same_in_any_pieces(kind: Any, dtype: torch.dtype) -> None:
    if dtype == torch.float4_e2m1fn_x2 or (kind == "codes" and dtype.itemsize > 1):
        pytest.skip("no float that a checkpoint has as such")
    entries = {"a": (0, 1000), "b": (1000, 24)}
    tensors = {
        name: TensorEntry(name, dtype, (count,), 0, first * dtype.itemsize, count * dtype.itemsize)
        for name, (first, count) in entries.items()
    }
    index = CheckpointIndex((Shard("f", 1024 * dtype.itemsize),), tensors, 0, {})
    source = MadeUp(None, index, dict.fromkeys(tensors, kind))  # type: ignore[arg-type]  # nothing is stored
    whole = torch.zeros(1024 * dtype.itemsize, dtype=torch.uint8)
    source.read_into("f", 0, whole.numpy().data)
    assert torch.isfinite(whole.view(dtype).float()).all()
    for low in range(0, len(whole), 96):
        piece = torch.zeros(min(96, len(whole) - low), dtype=torch.uint8)
        source.read_into("f", low, piece.numpy().data)
        assert torch.equal(piece, whole[low : low + 96])


def test_what_weights_there_are(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(PolicyError, match="weights is 'random'; choose one of checkpoint, dummy"):
        load(checkpoint("llama"), "none", "random")
