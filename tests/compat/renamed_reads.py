"""What a tool has read of a checkpoint whose names differ from its modules', beside what quantload makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import renamed_architectures
import torch
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.options import Activations
from torch import Tensor, nn

NAMES = [each.name for each in renamed_architectures.ALL]
TOWERS = ("*vision*", "*visual*", "*audio_tower*")
OTHERS = (("*layers.1.*q_proj", "none"), ("*layers.1*.mlp.*_proj", "fp8_per_channel"), ("*lm_head", "int8_per_channel"))
POLICIES = {
    "default": QuantizationPolicy(),
    "towers kept": QuantizationPolicy(ignore=TOWERS),
    "several formats": QuantizationPolicy(overrides=OTHERS),
}

ReadBack = Callable[[Any], Tensor | None]
"""The values of a module's quantized weight as a tool has them; nothing of one that it has not quantized."""


def check(name: str, scheme: str, form: str, policy: str, folder: Path, read_back: ReadBack, *, exact: bool) -> None:
    """Convert; the tool, and quantload itself, read every weight as an online load has it, and compute the same.

    `exact`: the tool rounds activations as `emulate` does, and logits are equal to the bit. Where it rounds them in
    its own way, logits of random weights move by up to a quarter: there it is the weights, module by module, that tell.
    """
    architecture = renamed_architectures.BY_NAME[name]
    source = renamed_architectures.save(name, folder / "source")
    out, chosen = folder / "out", POLICIES[policy]
    convert_checkpoint(source, out, scheme, format=form, policy=chosen)
    activations: Activations = (
        "none" if form == "compressed-tensors" and scheme in ("mxfp6_e2m3", "mxfp8") else "emulate"
    )
    ours = load_quantized(out, options=LoadOptions(activations=activations))
    _check_same(ours, load_quantized(source, scheme, policy=chosen))
    whole: Any = architecture.model_class.from_pretrained(out, dtype=torch.float32)  # scales get the model's dtype
    _check_weights(whole, ours, read_back)
    theirs: Any = architecture.model_class.from_pretrained(out, dtype=torch.bfloat16)
    with torch.no_grad():
        got, want = (model(**architecture.inputs()).logits.float() for model in (theirs, ours))
    if exact:
        assert torch.equal(got, want)
    else:
        assert torch.linalg.norm(got - want) < 0.3 * torch.linalg.norm(want)


def _check_same(got: nn.Module, want: nn.Module) -> None:
    own, online = got.state_dict(), want.state_dict()
    assert own.keys() == online.keys()
    for name, tensor in online.items():
        assert torch.equal(own[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def _check_weights(theirs: nn.Module, ours: nn.Module, read_back: ReadBack) -> None:
    quantized = {name for name, module in ours.named_modules() if hasattr(module, "scheme")}
    assert quantized
    for name, module in ours.named_modules():
        read = theirs.get_submodule(name)
        if name in quantized and hasattr(module, "weight_layouts"):
            for weight in ("gate_up_proj", "down_proj"):  # experts, which the tool decodes
                assert torch.equal(getattr(read, weight), module.dequantize(weight)), (name, weight)
        elif name in quantized or isinstance(module, nn.Linear):
            values = read_back(read)
            assert (values is not None) == (name in quantized), name
            pair: Any = (read.weight, module.weight) if values is None else (values, module.dequantize())
            assert torch.equal(pair[0].float(), pair[1].to(pair[0].dtype).float()), name
