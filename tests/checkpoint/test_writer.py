"""Shards written in any order and in any parts: the same file, readable by safetensors, and what is checked later."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from quantload.checkpoint.headers import read_header
from quantload.checkpoint.source import FileSource
from quantload.checkpoint.writer import Extent, ShardPlan, ShardWriter, TensorSpec, plan_shards, verified
from quantload.errors import OutputError
from safetensors.torch import load_file

WIDE = TensorSpec("wide", torch.float32, (3, 5))
BYTES = TensorSpec("bytes", torch.uint8, (7, 3))
EMPTY = TensorSpec("empty", torch.bfloat16, (0, 4))
NUMBER = TensorSpec("number", torch.int64, ())
VALUES = {
    "wide": torch.arange(15.0).view(3, 5),
    "bytes": torch.arange(21, dtype=torch.uint8).view(7, 3),
    "number": torch.tensor(-5),
}


def written(folder: Path, plan: ShardPlan, writes: list[tuple[int, torch.Tensor, int]]) -> list[Extent]:
    finished: list[list[Extent]] = []
    writer = ShardWriter(folder, plan, 2, lambda _, extents: finished.append(extents))
    for offset, data, pitch in writes:
        writer.write(offset, data, pitch)
    writer.done()
    assert not (folder / plan.path).exists()
    assert finished == []
    writer.done()
    (extents,) = finished
    return extents


def writes(plan: ShardPlan) -> list[tuple[int, torch.Tensor, int]]:
    """Whole rows, the number, and the columns of a matrix apart."""
    wide, bytes_ = VALUES["wide"].view(torch.uint8), VALUES["bytes"]
    at = plan.offsets
    return [
        (at["wide"], wide[:2], 20),
        (at["wide"] + 40, wide[2:], 20),
        (at["bytes"], bytes_[:, :1].contiguous(), 3),
        (at["bytes"] + 1, bytes_[:, 1:].contiguous(), 3),
        (at["number"], VALUES["number"].view(1).view(torch.uint8).view(1, 8), 8),
        (at["empty"], torch.empty(0, 8, dtype=torch.uint8), 8),
    ]


def test_one_file_with_wider_types_first() -> None:
    (plan,) = plan_shards([[BYTES, WIDE], [EMPTY], [NUMBER]], 10**9)
    assert plan.path == "model.safetensors"
    begin = len(plan.header)
    assert begin % 8 == 0
    assert plan.offsets == {"number": begin, "wide": begin + 8, "empty": begin + 68, "bytes": begin + 68}
    assert plan.size == begin + 89
    header = json.loads(plan.header[8:])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header["wide"] == {"dtype": "F32", "shape": [3, 5], "data_offsets": [8, 68]}


def test_files_keep_groups_together_and_stay_below_the_limit() -> None:
    specs = [TensorSpec(f"t{i}", torch.uint8, (10,)) for i in range(6)]
    groups = [specs[:1], specs[1:3], specs[3:5], specs[5:]]
    plans = plan_shards(groups, 30)
    assert [list(plan.offsets) for plan in plans] == [["t0", "t1", "t2"], ["t3", "t4", "t5"]]
    assert [plan.path for plan in plans] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [list(plan.offsets) for plan in plan_shards(groups, 5)] == [["t0"], ["t1", "t2"], ["t3", "t4"], ["t5"]]


@pytest.mark.parametrize("seed", range(5))
def test_any_order_gives_the_same_file(seed: int, tmp_path: Path) -> None:
    (plan,) = plan_shards([[WIDE, BYTES, EMPTY, NUMBER]], 10**9)
    order = writes(plan)
    random.Random(seed).shuffle(order)
    extents = written(tmp_path, plan, order)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    loaded = load_file(tmp_path / plan.path)
    assert loaded.keys() == {"wide", "bytes", "empty", "number"}
    assert all(torch.equal(loaded[name], value) for name, value in VALUES.items())
    assert loaded["empty"].shape == (0, 4)
    with FileSource(tmp_path) as source:
        assert read_header(source, plan.path).metadata == {"format": "pt"}
    assert verified(tmp_path / plan.path, plan, extents)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    (plan,) = plan_shards([[WIDE, BYTES, NUMBER]], 10**9)
    extents = written(tmp_path, plan, writes_without_empty(plan))
    path = tmp_path / plan.path
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert not verified(path, plan, extents), position
    path.write_bytes(content + b"\0")
    assert not verified(path, plan, extents)
    path.unlink()
    assert not verified(path, plan, extents)


def writes_without_empty(plan: ShardPlan) -> list[tuple[int, torch.Tensor, int]]:
    plan.offsets["empty"] = plan.size
    return writes(plan)


def test_a_full_disk_is_said_when_room_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (plan,) = plan_shards([[WIDE]], 10**9)
    writer = ShardWriter(tmp_path, plan, 1, lambda *_: None)
    with pytest.raises(OutputError, match=r"model\.safetensors: \d+ bytes cannot be written to .*: No space left"):
        writer.write(plan.offsets["wide"], VALUES["wide"].view(torch.uint8), 20)
    writer.close()
