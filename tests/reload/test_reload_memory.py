"""The promise of a reload: above the model it holds the staging arena and less than 64 MiB."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from new_weights import different, load, pointers
from quantload import LoadOptions, reload_weights
from quantload.checkpoint.resolve import resolve
from quantload.reload.folder import TensorsOf
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 1 << 20
SLACK = 64 * MIB
CHUNK = 8 * MIB


def big_llama(folder: Path, seed: int) -> Path:
    """A BF16 checkpoint of some 450 MB."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=160, num_key_value_heads=8, **sizes)).bfloat16()
    model.save_pretrained(folder)
    return folder


def one_by_one(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own, let go when the next is asked for."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys(), reverse=True):
            yield name, file.get_tensor(name).clone()


WAYS: dict[str, Callable[[Path], Any]] = {
    "folder": lambda folder: folder,
    "parts": lambda folder: TensorsOf(resolve(folder), LoadOptions(chunk_bytes=CHUNK)),
    "one by one": one_by_one,
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8_per_channel", "fp8_per_tensor", "nvfp4"])
def test_a_reload_holds_no_second_copy(tmp_path: Path, scheme: str) -> None:
    folders = big_llama(tmp_path / "old", 0), big_llama(tmp_path / "new", 1)
    model = load(folders[0], scheme)
    fresh = load(folders[1], scheme)
    where = pointers(model)
    for give in WAYS.values():
        reload_weights(model, folders[0], progress=False)
        gc.collect()
        report = reload_weights(model, give(folders[1]), progress=False)
        assert different(model, fresh) == []
        assert pointers(model) == where
        assert report.final_bytes > 1.5 * SLACK  # a second copy would be seen
        assert report.peak_bytes < report.staging_peak_bytes + SLACK, report.peak_bytes >> 20
