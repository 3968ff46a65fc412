"""What `convert` says of experts that a tool would take for numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from quantload import convert_checkpoint


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
