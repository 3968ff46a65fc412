"""The tokenizer of a checkpoint: one that is not there is said to be missing, whoever needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantload.checkpoint.folder import Checkpoint
from quantload.cli import DEMO_MODEL
from quantload.errors import CheckpointError
from quantload.fit.text_windows import text_windows
from quantload.tokenizer import load_processor


def test_an_empty_one_that_transformers_makes_for_a_model_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    here = Checkpoint(tmp_path, "mine")
    with pytest.raises(CheckpointError, match=r"'mine' has no tokenizer; put its tokenizer\.json"):
        load_processor(here, False)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        text_windows(here, "a text " * 100, False, "eval", 512, 8)
    assert load_processor(Checkpoint(DEMO_MODEL, "demo"), False)("Hi")["input_ids"]
