"""A converted checkpoint is the one the reference tool writes: names, shapes, dtypes, bytes and config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import raw_checkpoint
import torch
from quantload import convert_checkpoint
from test_golden import canonical


@pytest.mark.parametrize(
    ("original", "export"), [("bf16_llama", "quark_llama_mxfp4"), ("bf16_qwen3moe", "quark_qwen3moe_mxfp4")]
)
def test_mxfp4_equals_quark(original: str, export: str, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / original, tmp_path / "out", "quark_mxfp4")
    got, want = raw_checkpoint.read(tmp_path / "out"), raw_checkpoint.read(golden / export)
    assert {name: (t.dtype, t.shape) for name, t in got.items()} == {n: (t.dtype, t.shape) for n, t in want.items()}
    quantized = [name.removesuffix("_scale") for name in want if name.endswith("_scale")]
    for name in quantized:
        codes, scales = canonical(got[name], got[f"{name}_scale"])
        wanted_codes, wanted_scales = canonical(want[name], want[f"{name}_scale"])
        assert torch.equal(codes, wanted_codes), name
        assert torch.equal(scales, wanted_scales), name
    for name in set(want) - set(quantized) - {f"{name}_scale" for name in quantized}:
        assert torch.equal(got[name], want[name]), name
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (golden / export / "config.json").read_text()
    )
