"""AMD Quark, through its own import in transformers, reads what is written as `quark`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import renamed_reads
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


# Quark finds no linear layers in the experts of a module, and transformers none of their scales.
DENSE = [name for name in renamed_reads.NAMES if name != "mixtral"]


@pytest.mark.parametrize("policy", renamed_reads.POLICIES)
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_channel"])
@pytest.mark.parametrize("name", DENSE)
def test_modules_that_have_other_names_in_the_files(name: str, scheme: str, policy: str, tmp_path: Path) -> None:
    exact = scheme in MX and policy != "several formats"
    renamed_reads.check(name, scheme, "quark", policy, tmp_path, read_back, exact=exact)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in ("quark_mxfp4", "fp8_per_channel")])
def test_every_scheme_in_modules_that_have_other_names(scheme: str, tmp_path: Path) -> None:
    renamed_reads.check("llava", scheme, "quark", "towers kept", tmp_path, read_back, exact=scheme in MX)


def read_back(module: Any) -> Tensor | None:
    is_quantized = type(module).__name__ == "QParamsLinear"
    return module.weight_quantizer(module.weight) if is_quantized else None
