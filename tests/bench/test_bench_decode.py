"""`bench/decode_cpu.py` and `bench/one_token.py`: their arithmetic, and in the slow group a run with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import decode_cpu
import one_token
import pytest
import torch


def found(seconds: dict[str, float]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Three turns of every work, in which a side takes so many seconds for 12 tokens, and once ten times as many."""
    turns = {name: [{"tokens": 12, "processor": s * t, "wall": s} for t in (1, 10, 1)] for name, s in seconds.items()}
    return dict.fromkeys(decode_cpu.WORKS, turns)


def test_figures_are_medians_and_ratios_are_to_the_others_of_a_group() -> None:
    seconds = {"quantload quark_mxfp4": 2.0, "llama.cpp MXFP4": 1.0, "transformers BF16": 4.0}
    records = decode_cpu.records_of(found(seconds), "quark_mxfp4", 1)
    records += decode_cpu.records_of(found({"quantload none": 8.0, "transformers BF16": 8.0}), "none", 1)
    assert {each["tokens/processor"] for each in records if each["side"] == "quantload quark_mxfp4"} == {6.0}
    works = len(decode_cpu.WORKS)
    assert {name: of for name, _, *of in decode_cpu.ratios(records)} == {
        "quantload quark_mxfp4 / llama.cpp MXFP4": ["0.50"] * works,
        "quantload quark_mxfp4 / transformers BF16": ["2.00"] * works,
        "quantload none / transformers BF16": ["1.00"] * works,
    }
    rows = [line for line in decode_cpu.table(records, "processor").splitlines() if "transformers" in line]
    assert rows == ["| transformers BF16 | 1 |" + f" {each} |" * works for each in (3.0, 1.5)]


@pytest.mark.parametrize("name", ["plain_f32", "mxfp4"])
def test_kernel_and_read_go_through_the_same_bytes(name: str) -> None:
    (record,) = one_token.measure(name, [1], (64, 128), 2, 0)
    assert record["of_read"] > 0
    assert set(record["gb_per_s"]) == ({"read", "kernel", "torch"} if name == "plain_f32" else {"read", "kernel"})
    weights, x = (
        one_token.weights_of(name, 64, 128, 0),
        torch.ones(1, 128, dtype=one_token.PLAIN.get(name, torch.bfloat16)),
    )
    sides: Any = one_token.sides_of(name, weights, x, 64)
    assert torch.equal(sides["kernel"](0), sides["kernel"](1))


@pytest.mark.slow
def test_a_tiny_model_takes_turns(tmp_path: Path) -> None:
    script = str(Path(decode_cpu.__file__))
    chosen = ["--shape", "tiny", "--turns", "1", "--tokens", "2", "--threads", "1", "--schemes", "quark_mxfp4"]
    subprocess.run([sys.executable, script, *chosen, "--out", str(tmp_path)], check=True, timeout=300)
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())["records"]
    assert {each["side"] for each in records} == {"quantload quark_mxfp4", "transformers BF16"}
    assert all(each["tokens/wall"] > 0 for each in records)
