"""What a command that fails leaves: a message with its class, a JSON object for a program, a page for a person."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from quantload import cli
from quantload.errors import MemoryBudgetError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`quantload` in this process: exit code, standard output, standard error."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantload", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return command


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "said"),
    [
        (["load", "./none"], 3, "ModelNotFoundError", "is no folder here"),
        (["load", "-q", "foo"], 2, "UnknownSchemeError", "'foo'"),
        (["plan", "--max-memory", "1"], 2, "PolicyError", "--max-memory: '1' has no unit"),
        (["compare", "./none"], 3, "ModelNotFoundError", "is no folder here"),
        (["generate", "./none", "-p", "x"], 3, "ModelNotFoundError", "is no folder here"),
        (["convert", "./none", "out"], 3, "ModelNotFoundError", "is no folder here"),
        (["report", "./none"], 2, "PolicyError", "cannot be read"),
        (["report", __file__], 2, "PolicyError", "--report"),
    ],
)
def test_a_failed_command_says_its_class_and_is_an_object_with_json(
    arguments: list[str], code: int, kind: str, said: str, run: Run
) -> None:
    ended, out, err = run(*arguments)
    assert (ended, out) == (code, "")
    assert err.rstrip().endswith(f" [{kind}]")
    ended, out, err = run(*arguments, "--json")
    error = json.loads(out)["error"]
    assert (ended, error["type"], error["exit_code"]) == (code, kind, code)
    assert kind in error["types"]
    assert said in error["message"]
    assert error["message"] in err
    assert error["remedy"]


def test_log_lines_as_json_have_the_class_in_a_field_of_its_own(run: Run) -> None:
    _, _, err = run("load", "./none", "--log-format", "json")
    last = json.loads(err.splitlines()[-1])
    assert (last["error"], "[" in last["message"]) == ("ModelNotFoundError", False)


def test_a_scheme_that_does_not_exist_has_its_page(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("load", "-q", "foo", "--html", page)[0] == 2
    text = page.read_text(encoding="utf-8")
    assert "UnknownSchemeError: " in text
    assert "As it stands it fails again" in text


@pytest.mark.parametrize(
    ("given", "told", "not_told"),
    [
        (["--fit", "16GiB"], "--fit auto", ["--max-memory", "narrower scheme"]),
        (["--max-memory", "1GiB"], "Raise the limit", ["Give a larger size", "End what else"]),
        ([], "narrower scheme", ["--max-memory", "Give a larger size"]),
    ],
)
def test_what_is_advised_is_about_the_options_that_were_given(
    given: list[str], told: str, not_told: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryBudgetError("too large")

    monkeypatch.setattr("quantload.load.load_quantized", refuse)
    page = tmp_path / "page.html"
    _, out, _ = run("load", "--json", "--html", page, *given)
    advice = " ".join(json.loads(out)["error"]["remedy"])
    assert told in advice
    assert not [each for each in not_told if each in advice]
    steps = page.read_text(encoding="utf-8").partition('id="next-heading"')[2].partition("</ol>")[0]
    assert not [each for each in not_told if each in steps]


def test_an_option_from_the_environment_counts_as_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTLOAD_MAX_MEMORY", "1KiB")
    _, out, _ = run("load", "--json")
    assert "Raise the limit" in " ".join(json.loads(out)["error"]["remedy"])
