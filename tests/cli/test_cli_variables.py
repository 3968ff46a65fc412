"""Options by the environment, where a name is nearly that of one."""

from __future__ import annotations

import pytest
from quantload.cli import app
from typer.testing import CliRunner


def test_a_misspelt_variable_is_said_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("QUANTLOAD_MAX_MEMROY", "QUANTLOAD_MAX_MEMORY", "QUANTLOAD_SOMETHING_ELSE"):
        monkeypatch.setenv(name, "1GiB")
    assert CliRunner().invoke(app, ["schemes", "--json"]).exit_code == 0
    (said,) = [record.message for record in caplog.records if record.name == "quantload"]
    assert said == "QUANTLOAD_MAX_MEMROY is set, and no option is of that name: is QUANTLOAD_MAX_MEMORY meant?"
