"""Where tensors lie in the files of an entry."""

from __future__ import annotations

import json

import pytest
import torch
from quantload.cache import shards
from quantload.cache.shards import index_file, plan_shards
from quantload.checkpoint.weight_map import parse_weight_map
from safetensors.torch import load


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


TENSORS = {
    "codes": meta(torch.uint8, 3, 5),
    "scale": meta(torch.float32),
    "empty": meta(torch.bfloat16, 0, 4),
    "fp8": meta(torch.float8_e4m3fn, 2, 2),
}


def test_safetensors_reads_the_head() -> None:
    (plan,) = plan_shards(TENSORS)
    assert plan.name == "model.safetensors"
    data = bytearray(plan.head) + bytes(plan.size - len(plan.head))
    for name, offset in plan.offsets.items():
        if TENSORS[name].nbytes:
            data[offset] = 1
    read = load(bytes(data))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()
    }
    assert all(tensor.view(-1).view(torch.uint8)[0] == 1 for tensor in read.values() if tensor.numel())
    assert len(plan.head) % shards.ALIGNMENT == 0
    assert index_file([plan]) == {}


def test_large_models_have_several_files_and_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 16)
    plans = plan_shards({"a": meta(torch.uint8, 10), "b": meta(torch.uint8, 6), "c": meta(torch.uint8, 40)})
    assert [(plan.name, list(plan.offsets)) for plan in plans] == [
        ("model-00001-of-00002.safetensors", ["a", "b"]),
        ("model-00002-of-00002.safetensors", ["c"]),
    ]
    ((name, content),) = index_file(plans).items()
    assert name == "model.safetensors.index.json"
    assert parse_weight_map(content, name) == {"a": plans[0].name, "b": plans[0].name, "c": plans[1].name}
    assert json.loads(content)["metadata"] == {"total_size": 56}


def test_the_checksums_of_a_file_know_its_head() -> None:
    (plan,) = plan_shards(TENSORS)
    assert plan.checksums().size == plan.size
    assert plan.checksums().differs(0, memoryview(plan.head), lambda *_: bytearray()) is None
