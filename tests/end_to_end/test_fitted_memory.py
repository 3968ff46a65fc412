"""What `--fit` chooses stays below the size it was given, in processes that the kernel gives no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import big_checkpoints
import pytest
from quantload import LoadOptions, plan_quantized
from quantload.fit.choice import ladder_of

HERE = Path(__file__).parent
SIZES = 10
OPTIONS = {"workers": 2, "staging_bytes": 16 << 20}
CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "dense": lambda folder: big_checkpoints.llama(
        folder, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, vocab_size=4096
    ),
    "moe": lambda folder: big_checkpoints.qwen3_moe(
        folder, hidden_size=512, moe_intermediate_size=256, num_experts=32, num_hidden_layers=6, vocab_size=4096
    ),
}


def loads(path: Path, wanted: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What came of each load, of a size to choose for and the bytes that the process may have for it."""
    given = json.dumps({"path": str(path), "options": OPTIONS, "loads": wanted})
    command = [sys.executable, str(HERE / "fitted_loads.py"), given]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["size"] for each in found] == [size for size, _ in wanted], done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_load_needs_no_more_than_the_size_it_was_given(name: str, tmp_path: Path) -> None:
    """At ten sizes, from the smallest that fits to one that leaves the model as stored; with less it is refused."""
    path = CHECKPOINTS[name](tmp_path / name)
    options = LoadOptions.from_mapping(OPTIONS)
    schemes = ladder_of(plan_quantized(path, "nl4", device="cpu", options=options), options)
    plans = [plan_quantized(path, scheme, device="cpu", options=options).plan.memory for scheme in schemes]
    low, high = plans[0].peak_bytes, plans[-1].peak_bytes
    sizes = [low + (high - low) * step // (SIZES - 1) for step in range(SIZES)]
    found = loads(path, [*((size, size) for size in sizes), (high, plans[-1].final_bytes)])
    refused = found.pop()
    assert (refused.get("error"), "RLIMIT_DATA" in refused.get("message", "")) == ("MemoryBudgetError", True), refused
    for size, told in zip(sizes, found, strict=True):
        assert "error" not in told, told
        assert told["peak_bytes"] <= told["predicted_peak_bytes"] <= size
        assert told["final_bytes"] == told["chosen_bytes"]
    assert len({told["final_bytes"] for told in found}) >= SIZES // 2
    assert (found[0]["schemes"], found[-1]["schemes"]) == ([schemes[0]], [])
