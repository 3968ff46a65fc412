"""Weights that are scaled together: which they are, that they stand in one file, and that they have one scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantload import convert_checkpoint
from quantload.checkpoint.index import read_index
from quantload.checkpoint.resolve import resolve
from safetensors.torch import load_file

MERGED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def in_small_files(checkpoint: Path, out: Path) -> dict[str, str]:
    """The file of every tensor of a conversion to NVFP4 whose files hold little more than a tensor."""
    convert_checkpoint(checkpoint, out, "nvfp4", format="modelopt", max_shard_bytes=5000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files: dict[str, str] = index["weight_map"]
    return files


def test_what_engines_run_as_one_is_in_one_file_under_one_scale(golden: Path, tmp_path: Path) -> None:
    files = in_small_files(golden / "bf16_llama", tmp_path / "out")
    assert len(set(files.values())) > 10
    tensors = {name: load_file(tmp_path / "out" / file)[name] for name, file in files.items()}
    original = load_file(golden / "bf16_llama" / "model.safetensors")
    layers = sorted({name.rpartition(".self_attn.q_proj")[0] for name in files if ".self_attn.q_proj.weight" in name})
    assert len(layers) == 2
    for layer in layers:
        for group in MERGED:
            names = [f"{layer}.{module}.weight" for module in group]
            assert len({files[name] for name in names}) == 1
            scales = {float(tensors[f"{name}_scale_2"]) for name in names}
            largest = max(original[name].abs().max() for name in names).float()
            assert scales == {float(largest / 2688)}
        alone = f"{layer}.self_attn.o_proj.weight"
        assert float(tensors[f"{alone}_scale_2"]) == float(original[alone].abs().max().float() / 2688)


@pytest.mark.parametrize("format_name", ["modelopt", "compressed-tensors"])
def test_codes_do_not_depend_on_how_files_are_cut(format_name: str, golden: Path, tmp_path: Path) -> None:
    for name, size in (("small", 5000), ("large", 1 << 30)):
        convert_checkpoint(golden / "bf16_llama", tmp_path / name, "nvfp4", format=format_name, max_shard_bytes=size)
    got: dict[str, torch.Tensor] = {}
    for shard in read_index(resolve(tmp_path / "small")).shards:
        got |= load_file(tmp_path / "small" / shard.path)
    want = load_file(tmp_path / "large" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
