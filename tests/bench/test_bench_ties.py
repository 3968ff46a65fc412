"""`bench/ties.py`: what it compares, and that it finds what it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ties
from quantload.model import transformers_api


def run(out: Path) -> tuple[int, dict[str, Any]]:
    code = ties.main(["--only", "^(BartForConditionalGeneration|LlamaForCausalLM|LlamaModel)$", "--out", str(out)])
    (path,) = out.iterdir()
    return code, json.loads(path.read_text())


def test_each_name_of_each_class_is_a_case(tmp_path: Path) -> None:
    code, result = run(tmp_path)
    assert (code, result["classes"], result["counts"], result["largest_group"]) == (0, 2, {ties.SAME: 6}, 4)


def test_names_that_are_not_enough_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_api, "tie_to", lambda *_: None)
    code, result = run(tmp_path)
    assert code == 1
    assert result["counts"] == {ties.SAME: 2, ties.MISSED: 4}
    assert result["rows"][0]["missed"] == ["model.shared.weight"]
