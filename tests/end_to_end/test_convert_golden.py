"""A converted checkpoint is the one the reference tool writes: names, shapes, dtypes, bytes and config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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


STORED = Path(__file__).parents[1] / "data" / "stored"


def without_negative_zeros(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of four or six bits, one a number, with those of -0 mapped to 0."""
    stream = torch.from_numpy(np.unpackbits(codes.numpy(), axis=-1, bitorder="little")).view(len(codes), -1, bits)
    values = (stream.int() << torch.arange(bits)).sum(-1)
    return values.masked_fill(values == 1 << (bits - 1), 0)


@pytest.mark.parametrize("scheme", ["mxfp6_e2m3", "mxfp6_e3m2"])
def test_mxfp6_equals_quark(scheme: str, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", scheme)
    got, want = raw_checkpoint.read(tmp_path / "out"), raw_checkpoint.read(STORED / f"quark_llama_{scheme}")
    quantized = [name.removesuffix("_scale") for name in want if name.endswith("_scale")]
    assert quantized
    for name in quantized:
        codes, wanted = without_negative_zeros(got[name], 6), without_negative_zeros(want[name], 6)
        assert torch.equal(codes, wanted), name
        empty = (codes.unflatten(1, (-1, 32)) == 0).all(-1)
        assert torch.equal(got[f"{name}_scale"][~empty], want[f"{name}_scale"][~empty]), name
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written == json.loads((STORED / f"quark_llama_{scheme}/config.json").read_text())["quantization_config"]


def test_mxfp4_equals_compressed_tensors(golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "quark_mxfp4", format="compressed-tensors")
    got, want = raw_checkpoint.read(tmp_path / "out"), raw_checkpoint.read(STORED / "ct_llama_mxfp4")
    assert any(name.endswith("weight_packed") for name in want)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    (written,) = config_groups(tmp_path / "out")
    (wanted,) = config_groups(STORED / "ct_llama_mxfp4")
    assert written == wanted


def config_groups(folder: Path) -> list[object]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return list(config["config_groups"].values())
