from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from quantload.checkpoint.folder import Checkpoint
from quantload.errors import QuantloadError
from quantload.model.remote_code import code_of, warn_of_code
from quantload.model.skeleton import find_model

CONFIG = {"model_type": "evil", "auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "org/repo--other.Model"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a/b--c.D", None]}}))
    (tmp_path / "modeling.py").write_text("raise ValueError('it ran')")
    (tmp_path / "generate").mkdir()
    (tmp_path / "generate" / "generate.py").write_text("")
    return tmp_path


def test_all_code_is_named_before_it_runs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(QuantloadError, match="it ran"):
        find_model(Checkpoint(folder, "org/evil"), trust_remote_code=True)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "org/evil" in record.getMessage()
    for code in ("modeling.py", "generate/generate.py", "org/repo", "a/b"):
        assert code in record.getMessage()


def test_it_is_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        warn_of_code(folder, "x")
    assert len(caplog.records) == 1


def test_nothing_is_said_where_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": null}')
    warn_of_code(tmp_path, "x")
    assert code_of(tmp_path) == []
    assert not caplog.records


def test_without_trust_nothing_runs_and_nothing_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(QuantloadError) as caught:
        find_model(Checkpoint(folder, "x"), trust_remote_code=False)
    assert "it ran" not in str(caught.value)
    assert not [record for record in caplog.records if "rights" in record.getMessage()]
