"""What `convert` says of experts that a tool would take for numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from quantload import QuantizationPolicy, convert_checkpoint


@pytest.mark.parametrize(
    ("scheme", "form", "warns"),
    [
        ("int8_per_channel", "quark", True), ("quark_mxfp4", "quark", True), ("nvfp4", "compressed-tensors", True),
        ("quark_mxfp4", "compressed-tensors", False), ("fp8_per_channel", "compressed-tensors", False),
    ],
)  # fmt: skip
def test_experts_that_transformers_does_not_read_are_warned_of(
    scheme: str,
    form: str,
    warns: bool,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    convert_checkpoint(checkpoint("qwen3_moe"), tmp_path / "out", scheme, format=form)
    assert ("transformers does not read experts in" in caplog.text) == warns


@pytest.mark.parametrize(
    ("scheme", "form", "ignore", "warns"),
    [
        ("quark_mxfp4", "quark", (), True), ("fp8_per_channel", "compressed-tensors", (), True),
        ("quark_mxfp4", "quark", ("*.wo",), False), ("int8_per_channel", "quark", (), False),
    ],
)  # fmt: skip
def test_layers_whose_input_transformers_casts_to_codes_are_warned_of(
    scheme: str,
    form: str,
    ignore: tuple[str, ...],
    warns: bool,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """T5 casts to `self.wo.weight.dtype`, unless that is INT8; with Quark its logits were off by 85 %, silently."""
    policy = QuantizationPolicy(ignore=ignore)
    convert_checkpoint(checkpoint("t5"), tmp_path / "out", scheme, format=form, policy=policy)
    said = "transformers casts the input of 4 layers to the dtype of their weights"
    assert (said in caplog.text) == warns
    assert ("keep the layers for transformers with --ignore '*.wo'" in caplog.text) == warns
