"""What `serve` puts together: a tokenizer and a model of one checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import quantload
from quantload import LoadOptions, QuantizationPolicy
from quantload.errors import ChangedFileError
from quantload.server import command
from quantload.server.load_progress import LoadProgress

DEMO = Path(quantload.__file__).parent / "demo_model"


def served(folder: Path, monkeypatch: pytest.MonkeyPatch, between: Any) -> Any:
    """The model that would be served, if `between` happens after its tokenizer was loaded."""
    made: list[Any] = []

    def serve(load: Any, load_processor: Any, **rest: Any) -> None:
        assert rest["log_level"] is None  # the command line has said what is logged
        made.append(load_processor())
        between()
        made.append(load(LoadProgress(), threading.Event()))

    monkeypatch.setattr(command, "serve", serve)
    monkeypatch.setattr(command, "check_processor", lambda *_: None)
    command.serve_model(
        folder, "none", device="cpu", policy=QuantizationPolicy(linear="none"), options=LoadOptions(stats=False),
        revision=None, trust_remote_code=False, host="127.0.0.1", port=0, api_key=None, served_model_name="demo",
        continuous_batching=False,
    )  # fmt: skip
    return made[1]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_model_that_changes_after_its_tokenizer_was_loaded_is_not_served(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    assert (folder / name).is_file()

    def replace() -> None:
        shutil.copy2(folder / name, folder / "new")
        os.replace(folder / "new", folder / name)

    with pytest.raises(ChangedFileError, match=rf"{name}: changed while it was read"):
        served(folder, monkeypatch, replace)


def test_a_link_that_is_turned_after_the_tokenizer_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served is the model the tokenizer is of, under the name that was given."""
    for version in ("old", "new"):
        shutil.copytree(DEMO, tmp_path / version)
        config = json.loads((tmp_path / version / "config.json").read_text())
        (tmp_path / version / "config.json").write_text(json.dumps(config | {"mark": version}))
    (tmp_path / "current").symlink_to("old")

    def turn() -> None:
        (tmp_path / "next").symlink_to("new")
        os.replace(tmp_path / "next", tmp_path / "current")

    model = served(tmp_path / "current", monkeypatch, turn)
    assert model.config.mark == "old"
    assert model.load_report.model == str(tmp_path / "current")
