"""After an error or Ctrl-C in the middle of a real load, memory, threads and descriptors are what they were."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import big_checkpoints
import pytest
import raw_checkpoint
import torch
from process_state import MIB
from safetensors.torch import load_file

Checkpoint = Callable[[str], Path]
HERE = Path(__file__).parent
SLACK = 8 * MIB


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB of BF16 in three shards."""
    folder = tmp_path_factory.mktemp("big") / "llama"
    return big_checkpoints.llama(folder, shards=3, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)


def variant(big: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> Path:
    """A copy of `big`, by hard links except for its last shard, which is written anew after `change`."""
    folder.mkdir()
    *same, last = sorted(big.glob("*.safetensors"))
    for file in [*same, *big.glob("*.json")]:
        os.link(file, folder / file.name)
    if change is None:
        shutil.copy(last, folder / last.name)
        return folder
    tensors = load_file(last)
    change(tensors)
    raw_checkpoint.write_shard(folder / last.name, tensors)
    index = json.loads((big / raw_checkpoint.INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != last.name or k in tensors}
    (folder / raw_checkpoint.INDEX).unlink()
    (folder / raw_checkpoint.INDEX).write_text(json.dumps(index))
    return folder


def test_errors_and_interrupts_leave_nothing_behind(big: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    last_weight = "model.layers.2.mlp.down_proj.weight"
    shrinking = variant(big, tmp_path / "shrinking")
    loads = [
        (variant(big, tmp_path / "nan", lambda t: t[last_weight].__setitem__((-1, -1), torch.nan)), "plain"),
        (variant(big, tmp_path / "missing", lambda t: t.pop(last_weight)), "plain"),
        (variant(big, tmp_path / "shape", lambda t: t.update({last_weight: t[last_weight].t()})), "plain"),
        (big, "budget"),
        (shrinking, "shrink"),
        (big, "interrupt"),
    ]
    # Only the copied shard may shrink: the others are shared with `big`.
    for file in sorted(shrinking.glob("*.safetensors"))[:-1]:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    command: list[str | Path] = [
        sys.executable,
        HERE / "failing_loads.py",
        checkpoint("llama"),
        json.dumps([(str(p), h) for p, h in loads]),
    ]
    child = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout.splitlines()[-1])
    assert [result["error"] for result in results] == [
        "NonFiniteWeightError",
        "MissingWeightsError",
        "ShapeMismatchError",
        "MemoryBudgetError",
        "TruncatedShardError",
        "KeyboardInterrupt",
    ], [result["message"] for result in results]
    for result in results:
        before, after = result["before"], result["after"]
        assert after["anonymous"] <= before["anonymous"] + SLACK, result
        assert after["descriptors"] <= before["descriptors"], result
        assert after["threads"] <= before["threads"], result
        assert after["tasks"] <= before["tasks"], result
    assert results[-1]["seconds_to_stop"] < 2
