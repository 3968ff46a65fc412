"""`bench/all.py`: what it would run, and that a failure is said."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import all as bench_all
import pytest


def options(tmp_path: Path, **more: object) -> argparse.Namespace:
    values = {"names": [], "quick": False, "peers_python": "PEERS", "work": tmp_path, "keep": False}
    return argparse.Namespace(**values | {"results": tmp_path / "results"} | more)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", bench_all.RUNS)
def test_every_script_takes_its_arguments(
    name: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = bench_all.command(name, options(tmp_path, quick=quick))
    assert Path(line[1]).is_file()
    module = script(Path(line[1]))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", _stop_when_parsed(line[2:]))
    with pytest.raises(_Parsed):
        module.main()


def script(path: Path) -> Any:
    """The script under a name of its own: `kernels` is also that of a package."""
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Parsed(Exception):
    pass


def _stop_when_parsed(arguments: list[str]) -> object:
    original = argparse.ArgumentParser.parse_known_args

    def parse_args(self: argparse.ArgumentParser, given: list[str] | None = None) -> argparse.Namespace:
        _, unknown = original(self, arguments)
        assert not unknown
        raise _Parsed

    return parse_args


def test_the_one_that_takes_the_disk_runs_last_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "dense-1"
    left.mkdir()
    (left / "recipe.json").touch()
    ran: list[str] = []

    def execute(line: list[str]) -> int:
        ran.append(Path(line[1]).stem)
        assert left.exists() == (ran[-1] != "bigger_than_memory")
        return int(ran[-1] == "quality")

    monkeypatch.setattr(bench_all, "execute", execute)
    assert bench_all.run_all(options(tmp_path, names=["bigger_than_memory", "quality", "pipeline"])) == ["quality"]
    assert ran == ["pipeline", "quality", "bigger_than_memory"]


def test_a_command_tells_how_it_ended() -> None:
    assert bench_all.execute([sys.executable, "-c", "raise SystemExit(3)"]) == 3
