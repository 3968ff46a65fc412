"""transformers reads the experts of gpt-oss in their own layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantload import QuantizationPolicy, convert_checkpoint, load_quantized
from transformers import AutoModelForCausalLM, Mxfp4Config

pytestmark = pytest.mark.compat
pytest.importorskip("accelerate", reason="transformers reads MXFP4 with accelerate, which is not installed")


def test_transformers_dequantizes_it_to_the_values_we_load(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    policy = QuantizationPolicy(linear="none", experts="quark_mxfp4")
    convert_checkpoint(checkpoint("gpt_oss"), tmp_path / "out", policy=policy, format="mxfp4")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = load_quantized(tmp_path / "out")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        for weight in ("gate_up_proj", "down_proj"):
            got = getattr(theirs.get_submodule(name), weight)
            assert torch.equal(got.float(), ours.get_submodule(name).dequantize(weight)), (name, weight)
