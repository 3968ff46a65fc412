"""The scale mode of a policy reaches the kernels, the report, and everything that chooses them again."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import quantload
import torch
from quantload import LoadOptions, QuantizationPolicy, load_quantized
from quantload.errors import PolicyError
from quantload.kernels.registry import kernel_set
from quantload.schemes.registry import SchemeFactory

DEMO_MODEL = Path(quantload.__file__).parent / "demo_model"
LEAST_ERROR = QuantizationPolicy(scale_mode="mse")


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "mxfp6_e2m3", "int4_per_group"])
def test_a_load_with_the_least_error(scheme: str) -> None:
    name = "model.layers.0.self_attn.q_proj"
    usual, least = load_quantized(DEMO_MODEL, scheme), load_quantized(DEMO_MODEL, scheme, policy=LEAST_ERROR)
    gains = [
        (mse.sqnr_db or 0.0) - (even.sqnr_db or 0.0)
        for even, mse in zip(usual.load_report.layers, least.load_report.layers, strict=True)
    ]
    assert all(gain >= -1e-3 for gain in gains)
    assert sum(gains) / len(gains) > 0.005
    assert all(layer.kernel.endswith("numba, mse scales") for layer in least.load_report.layers)
    weight = load_quantized(DEMO_MODEL, "none").get_parameter(f"{name}.weight").detach()
    kernels = kernel_set(least.get_submodule(name).scheme.kernels.format.name, "cpu", {"quantize": "torch"}, "mse")
    state = least.state_dict()
    made = tuple(torch.empty_like(state[f"{name}.{each}"]) for each in ("weight", "weight_scale"))
    kernels.quantize(weight, made)
    assert torch.equal(made[0], state[f"{name}.weight"])
    assert torch.equal(made[1], state[f"{name}.weight_scale"])


@pytest.mark.parametrize("policy", [{"linear": "fp8_per_channel"}, {"linear": "mxfp8", "experts": "int8_per_channel"}])
def test_schemes_without_the_mode_are_refused_by_name(policy: dict[str, str]) -> None:
    with pytest.raises(PolicyError) as caught:
        load_quantized(DEMO_MODEL, policy=QuantizationPolicy(**policy, scale_mode="mse"))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{list(policy.values())[-1]} has no scale mode 'mse'")
    assert message.endswith("choose one of quark_mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8, nvfp4, int4_per_group")


def test_what_is_left_as_stored_has_no_scales_to_choose() -> None:
    model = load_quantized(DEMO_MODEL, "none", policy=LEAST_ERROR)
    assert not model.load_report.layers


def test_a_pickled_scheme_chooses_the_same_kernels() -> None:
    scheme = SchemeFactory(torch.device("cpu"), LoadOptions(kernels={"quantize": "torch"}), "mse").linear("mxfp8")
    assert scheme is not None
    again = pickle.loads(pickle.dumps(scheme.quantizer))
    assert (again.kernels.scale_mode, again.kernels.names) == ("mse", scheme.kernels.names)
    assert scheme.kernel_names.startswith("quantize=torch, ")
    assert scheme.kernel_names.endswith(", mse scales")
