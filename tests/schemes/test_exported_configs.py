"""What a `quantization_config` must say for engines that serve what is written."""

from __future__ import annotations

import pytest
from quantload.kernels.formats import FORMATS
from quantload.schemes.exported.compressed_tensors import COMPRESSED_TENSORS


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
    config = COMPRESSED_TENSORS.quantization_config({"experts.*.up_proj": FORMATS[name]}, [])
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == (weights, activations)
    assert group["input_activations"]["dynamic"] is True
