"""What a `quantization_config` must say for engines that serve what is written."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
from quantload.kernels.formats import FORMATS
from quantload.schemes.exported.compressed_tensors import COMPRESSED_TENSORS
from quantload.schemes.exported.quark import QUARK
from quantload.schemes.exported.weights import NamedModules


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("fp8_tensor", "tensor", "tensor"),
        ("fp8_channel", "channel", "token"),
        ("fp8_block", "block", "group"),
        ("int8_channel", "channel", "token"),
    ],
)
def test_vllm_and_sglang_take_experts_only_with_these_pairs_of_strategies(
    name: str, weights: str, activations: str
) -> None:
    config = COMPRESSED_TENSORS.quantization_config(NamedModules({"experts.*.up_proj": FORMATS[name]}))
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == (weights, activations)
    assert group["input_activations"]["dynamic"] is True


def test_vllm_looks_up_experts_in_quark_s_format_by_the_name_of_all_of_them() -> None:
    modules = {f"model.layers.1.attention.{name}": FORMATS["fp8_channel"] for name in "qkvo"}
    modules |= {f"model.layers.1.mlp.experts.*.{name}_proj": FORMATS["mxfp4"] for name in ("gate", "up", "down")}
    ((pattern, layer),) = QUARK.quantization_config(NamedModules(modules))["layer_quant_config"].items()
    assert layer["weight"]["dtype"] == "fp4"
    for name in ("model.layers.1.mlp.experts", "model.layers.1.mlp.experts.12.up_proj"):
        assert fnmatch(name, pattern)
    for name in ("model.layers.11.mlp.experts", "model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.gate"):
        assert not fnmatch(name, pattern)
