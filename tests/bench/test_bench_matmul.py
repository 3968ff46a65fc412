"""`bench/matmul_cpu.py` on small weights: what it times, what it checks, and what it concludes."""

from __future__ import annotations

from typing import Any

import matmul_cpu
import pytest
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import select

MIB = 1 << 20


def test_both_sides_are_timed_on_enough_copies() -> None:
    weights = matmul_cpu.make_weights("mxfp4", (64, 128), rotated_bytes=60_000)
    assert len(weights.bf16) == len(weights.codes) == 14  # of 4,352 bytes each
    assert len({tensor.data_ptr() for tensor in weights.codes}) == 14
    row = matmul_cpu.compare(weights, tokens=2, turns=3, turn_seconds=0.0)
    assert row["ratio"] == row["seconds"]["bf16"] / row["seconds"]["quantized"]
    assert [len(values) for values in row["seconds_all"].values()] == [3, 3]


@pytest.mark.parametrize("format_name", matmul_cpu.FORMATS_MEASURED)
def test_a_right_product_passes_and_a_wrong_one_does_not(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = matmul_cpu.make_weights(format_name, (128, 256), 0)
    assert matmul_cpu.check(weights, 3) < matmul_cpu.TOLERANCE
    right = select("linear", format_name, "cpu", "torch")
    monkeypatch.setattr(matmul_cpu, "select", lambda *_: lambda *a: right(*a) * 1.05)
    with pytest.raises(ValueError, match="is off by"):
        matmul_cpu.check(weights, 3)


def test_a_whole_bf16_weight_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    shape = (4096, 8192)  # 64 MiB, which malloc always maps anew
    weight_bytes = 2 * 4096 * 8192
    small = matmul_cpu.measure_peak("mxfp4", shape, 1)
    assert small < weight_bytes

    class Wasteful:
        format = FORMATS["mxfp4"]

        @staticmethod
        def linear(x: Any, tensors: Any, bias: Any, rows: int, cols: int) -> Any:
            return x @ torch.ones(rows, cols, dtype=torch.bfloat16).T

    weights = matmul_cpu.make_weights("mxfp4", (256, 256), 0)
    monkeypatch.setattr(matmul_cpu, "make_weights", lambda *_: weights)
    monkeypatch.setattr(matmul_cpu, "kernel_set", lambda *_: Wasteful)
    assert matmul_cpu.measure_peak("mxfp4", shape, 1) >= weight_bytes - MIB


def result() -> dict[str, Any]:
    def row(tokens: int, ratio: float) -> dict[str, Any]:
        seconds = {"bf16": ratio * 1e-3, "quantized": 1e-3}
        return {"format": "mxfp4", "rows": 4096, "cols": 4096, "tokens": tokens, "seconds": seconds, "ratio": ratio}

    rows = [row(1, 2.0), row(8, 1.4), row(512, 0.9)]
    peaks = [
        {"format": "mxfp4", "rows": 4096, "cols": 4096, "tokens": 1, "peak_bytes": 2 * MIB, "bf16_bytes": 32 * MIB}
    ]
    return {"formats": ["mxfp4"], "shapes": ["4096x4096"], "tokens": [1, 8, 512], "rows": rows, "peaks": peaks}


def test_the_slowest_decode_counts() -> None:
    decode, prefill, peak = matmul_cpu.goals_of(result())
    assert (decode.met, decode.reached) == (False, "1.40x, 6.7% short")
    assert prefill.met is True
    assert (peak.met, peak.reached) == (True, "0.06 of it")


def test_the_table_has_a_row_for_each_weight() -> None:
    assert "| mxfp4 4096x4096 | 1000 / 2000 | 2.00x | 1.40x | 0.90x | 2.0 of 32 |" in matmul_cpu.render(result())
