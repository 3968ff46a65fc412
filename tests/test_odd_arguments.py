"""Whatever stands on the command line ends in an exit code and one line that says what is wrong: in no traceback."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from quantload import cli, load_quantized
from quantload.server.binding import bind_socket

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
PATHS = (
    "",
    "~nobody/x",
    "/",
    "a\0b",
    "x" * 5000,
    "y" * 300,
    "folder",
    "file",
    "binary",
    "loop",
    "/no/such/x",
    "/dev/full",
)
NUMBERS = ("-1", "0", "1e3", "9" * 23, "nan", "x", "")
SIZES = ("-1", "0B", "16", "9" * 20 + "TiB", "0.0000001GiB", "1e9B", "x", "", "1GiB1GiB")
WORDS = (
    "",
    " ",
    "a\0b",
    "x" * 5000,
    "=",
    "a=",
    "=b",
    "a=b",
    "re:(",
    "re:(=none",
    "[",
    "\udc80",
    "cuda:99",
    "\n",
    "%s{}",
)
SLOW = {"load", "convert", "compare", "eval"}
"""Commands that do work where an argument is not refused; the quick test gives them only what is their own."""


def odd_values(parameter: Any) -> tuple[str, ...]:
    if parameter.metavar == "SIZE":
        return SIZES
    if parameter.name in ("model", "out", "path", "report", "html", "cache", "api_key_file"):
        return PATHS
    return (*NUMBERS, *WORDS)


def cases() -> Iterator[Any]:
    shared = {parameter.name for parameter in COMMANDS["plan"].params}
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if getattr(parameter, "is_flag", False) or (name in {*SLOW, "serve"} and parameter.name in shared):
                continue
            marks = [pytest.mark.slow] if name == "serve" else []
            yield pytest.param(name, parameter, id=f"{name}-{parameter.name}", marks=marks)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "folder").mkdir()
    (folder / "file").write_text("x")
    (folder / "binary").write_bytes(b"\xff\xfe\0")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in a folder of odd files; exit code, standard output and error."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantload", *arguments])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return code, *capfd.readouterr()

    return run


def arguments(command: str, parameter: Any, value: str, place: Path) -> list[str]:
    """A command with one odd value, and for the rest what it would work with."""
    model = {"load": [], "plan": [], "serve": [], "convert": [str(cli.DEMO_MODEL), str(place / "out")]}.get(command, [])
    if parameter.param_type_name == "argument":
        return [command, "--", *({"out": [str(cli.DEMO_MODEL)]}.get(parameter.name, [])), value, *model[1:]][:5]
    return [command, *model, parameter.opts[0], value]


@pytest.fixture
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load or conversion that is not refused, and a server, end here: only what is said before is looked at."""

    def end(*_: object, **__: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr("quantload.load.draft_load", end)
    monkeypatch.setattr("quantload.convert.planned.draft_load", end)
    monkeypatch.setattr("quantload.draft.draft_load", end)

    def bind(*_: object, host: str, port: int, **__: object) -> None:
        bind_socket(host, port).close()
        raise SystemExit(0)

    monkeypatch.setattr("quantload.server.command.serve", bind)


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize(("command", "parameter"), list(cases()))
def test_an_odd_value_is_refused_in_one_line_or_taken(command: str, parameter: Any, place: Path, run: Any) -> None:
    for value in odd_values(parameter):
        given = arguments(command, parameter, value, place)
        code, _, err = run(*given)
        said = [line for line in err.splitlines() if line.startswith("error:") or "ERROR" in line]
        assert "Traceback" not in err, given
        assert code in (0, 2, 3, 4), (given, code, err[-500:])
        if code:
            assert len(said) == 1 or "Usage: " in err, (given, err[-500:])
            assert all(len(line) < 4200 for line in said)


@pytest.mark.usefixtures("nothing_is_done")
def test_of_an_option_that_is_given_twice_the_last_counts(run: Any) -> None:
    assert run("plan", "--max-memory", "x", "--max-memory", "1GiB")[0] == 0
    code, _, err = run("plan", "--max-memory", "1GiB", "--max-memory", "x")
    assert (code, "'x' is not an amount of memory" in err) == (2, True)


def test_files_in_the_place_of_folders_and_nothing_in_the_place_of_both(run: Any, place: Path) -> None:
    for wrong, says in (
        ("file", "is a file"),
        ("binary", "is a file"),
        ("folder", "is empty"),
        ("loop", "leads nowhere"),
    ):
        code, out, err = run("plan", wrong)
        assert (code, out) == (3, ""), err
        assert says in err
    for out_folder in ("folder", "file", "loop"):
        code, _, err = run("convert", str(cli.DEMO_MODEL), out_folder)
        assert (code, "exists" in err or "no path" in err) in ((1, True), (2, True)), err
    assert sorted(path.name for path in place.iterdir()) == ["binary", "file", "folder", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written(run: Any, place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o000)
    for arguments in (["plan", "closed/x"], ["load", "--report", "closed/x"], ["load", "--cache", "closed/x"]):
        code, out, err = run(*arguments)
        assert (code in (2, 3), out) == (True, ""), err
    closed.rmdir()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return load_quantized(cli.DEMO_MODEL).load_report.to_dict()


@pytest.mark.slow
def test_a_report_with_a_field_of_another_kind_is_refused(report: dict[str, Any], run: Any, place: Path) -> None:
    path = place / "report.json"
    kept: Any = report["kept"]
    odd: tuple[Any, ...] = ("\0x", -1.5, [[]], {"a": 1}, None, True)
    changed = [report | {name: value} for name in report for value in odd]
    changed += [
        report | {"kept": [kept[0] | {"bytes": "x"}]},
        report | {"layers": [report["layers"][0] | {"numel": None}]},
    ]
    for values in changed:
        path.write_text(json.dumps(values))
        code, _, err = run("report", str(path))
        assert (code, err.count("error: ")) in ((0, 0), (2, 1)), err
    for content in ("", "[]", "[" * 100_000, "{}", '{"model": 1}'):
        path.write_text(content)
        code, out, err = run("report", str(path))
        assert (code, out) == (2, "")
        assert "not a load report" in err
    path.unlink()
