"""`bench/lazy_tensors.py`: a layer of its stand-in for an engine takes all tensors, by name and place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lazy_tensors
import pytest
import torch


@pytest.mark.slow
def test_one_layer_takes_all_of_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lazy_tensors.py", "--layers", "1", "--turns", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process
    lazy_tensors.main()
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert result["tensors"] == 3 * lazy_tensors.EXPERTS + len(lazy_tensors.KEPT) + len(lazy_tensors.QKV) + 2 + 3
    assert result["process_seconds"] > 0
