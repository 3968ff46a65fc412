"""AMD Quark, through its own import in transformers, reads what is written as `quark`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantload import LoadOptions, convert_checkpoint, load_quantized
from quantload.options import Activations
from quantload.schemes.exported.registry import formats_of
from quantload.schemes.registry import ENTRIES
from torch import Tensor
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.compat
pytest.importorskip("quark.torch", reason="AMD Quark is not installed, or its kernels cannot be compiled here")

SCHEMES = [entry.name for entry in ENTRIES if "quark" in formats_of(entry) and entry.linear is not None]
MX = ("quark_mxfp4", "mxfp6_e2m3", "mxfp6_e3m2")
IDS = torch.arange(1, 20).view(1, -1)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quark_reads_the_values_we_load(scheme: str, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", scheme)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    activations: Activations = "emulate" if scheme in MX else "none"
    ours = load_quantized(tmp_path / "out", options=LoadOptions(activations=activations))
    modules = {name: module for name, module in ours.named_modules() if hasattr(module, "scheme")}
    assert len(modules) == 14
    for name, module in modules.items():
        read = theirs.get_submodule(name)
        assert type(read).__name__ == "QParamsLinear"
        weight = read.weight_quantizer(read.weight)
        assert torch.equal(weight.float(), module.dequantize().to(weight.dtype).float()), name
    got, want = logits(theirs), logits(ours)
    if scheme in MX:
        assert torch.equal(got, want)
    else:  # Quark rounds FP8 and INT8 activations
        assert torch.linalg.norm(got - want) < 0.1 * torch.linalg.norm(want)
