"""Emulated activations: the matmul sees what MX hardware would."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantload
import torch
from quantload import LoadOptions, load_quantized
from quantload.errors import PolicyError
from quantload.kernels import mx, mxfp4
from torch import Tensor

DEMO_MODEL = Path(quantload.__file__).parent / "demo_model"


REFERENCES = {"quark_mxfp4": mxfp4.reference, **mx.references}


def rounded(x: Tensor, scheme: str) -> Tensor:
    fmt = REFERENCES[scheme].codec.format
    codes = torch.empty(fmt.code_shape(*x.shape), dtype=fmt.code_dtype)
    scales = torch.empty(fmt.scale_shape(*x.shape), dtype=fmt.scale_dtype)
    out = torch.empty_like(x)
    REFERENCES[scheme].quantize(x, codes, scales)
    REFERENCES[scheme].dequantize(codes, scales, out)
    return out


@pytest.mark.parametrize("scheme", REFERENCES)
def test_linear_sees_rounded_activations(scheme: str) -> None:
    plain = load_quantized(DEMO_MODEL, scheme)
    emulating = load_quantized(DEMO_MODEL, scheme, options=LoadOptions(activations="emulate"))
    name = "model.layers.0.self_attn.q_proj"
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = plain.get_submodule(name)(rounded(x, scheme))
    assert torch.equal(emulating.get_submodule(name)(x), expected)
    assert not torch.equal(plain.get_submodule(name)(x), expected)
    assert "activations emulated" in emulating.load_report.layers[0].kernel


def test_what_has_no_code_stays_visible() -> None:
    emulating = load_quantized(DEMO_MODEL, "quark_mxfp4", options=LoadOptions(activations="emulate"))
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[1, 3] = float("nan")
    out = emulating.get_submodule("model.layers.0.self_attn.q_proj")(x)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


def test_schemes_without_emulation_say_so() -> None:
    with pytest.raises(PolicyError, match="int8_per_channel cannot emulate"):
        load_quantized(DEMO_MODEL, "int8_per_channel", options=LoadOptions(activations="emulate"))
