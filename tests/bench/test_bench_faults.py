"""`bench/faults.py`: a few faults of each kind in every run of the tests, more of them in the slow group."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import faults
import faults_disk
import faults_files
import pytest
from faults_entries import racing, spoilt
from faults_subject import ERROR, RIGHT, Expected, Row, Subject

Subjected = tuple[Subject, Expected]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subjected:
    made = Subject(tmp_path_factory.mktemp("faults"))
    return made, made.measure()


def outcomes(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Of each way, where nothing is wrong."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        assert row.wrong == [], row
        of_way = found.setdefault(row.way, {})
        for outcome, count in row.outcomes.items():
            of_way[outcome] = of_way.get(outcome, 0) + count
    return found


def test_spoilt_entries(subject: Subjected) -> None:
    assert outcomes(spoilt(*subject, tries=14, seed=0)) == {"load from a cache": {RIGHT: 14}}


def test_racing_entries(tmp_path: Path) -> None:
    row = racing(tmp_path / "racing", 400, seed=0, kills=2)
    assert row.wrong == []
    assert row.tries >= 300
    assert {"published", "found"} <= row.outcomes.keys()


def test_files_that_change(subject: Subjected, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("one shard replaced", "shards written in place")
    monkeypatch.setattr(faults_files, "CHANGES", {name: faults_files.CHANGES[name] for name in names})
    found = outcomes(faults_files.changing(*subject, tries=1, seed=0))
    assert found.keys() == set(faults_files.WAYS)
    assert sum(each.get(ERROR, 0) for each in found.values()) >= 4


def test_reads_that_fail(subject: Subjected, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("EIO four times", "ESTALE for ever")
    monkeypatch.setattr(faults_files, "FAILURES", {name: faults_files.FAILURES[name] for name in names})
    found = outcomes(faults_files.failing(*subject, tries=1, seed=0))
    assert found == {way: {RIGHT: 3, ERROR: 1} for way in faults_files.WAYS}


def test_disks_that_fail(subject: Subjected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_disk, "CALLS", ("pwrite", "rename"))
    found = outcomes(faults_disk.disks(*subject, tries=2, seed=0))
    assert found["load with a cache"][RIGHT] >= 6
    assert found["convert"][ERROR] >= 2


def test_what_is_wrong_is_counted(subject: Subjected, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that gives up too early, and a conversion that leaves something half-finished."""
    made, expected = subject
    monkeypatch.setattr(faults_files, "FAILURES", {"EIO once": (errno.EIO, 99, RIGHT)})
    monkeypatch.setattr(faults_files, "WAYS", ("load",))
    row, *_ = faults_files.failing(made, expected, 1, seed=0)
    assert row.wrong == ["error for EIO once in preadv, which should be right"]
    (made.root / "half").mkdir(exist_ok=True)
    assert expected.leftovers(made.root / "none", made.root / "half") == [
        "the converted folder is not what it should be"
    ]


def test_the_same_seed_gives_the_same_checkpoint(tmp_path: Path) -> None:
    one, two = Subject(tmp_path / "one"), Subject(tmp_path / "two")
    for first, second in ((one.old, two.old), (one.new, two.new)):
        assert {path.name: path.read_bytes() for path in first.iterdir()} == {
            path.name: path.read_bytes() for path in second.iterdir()
        }
    shard = "model-00001-of-00002.safetensors"
    assert (one.old / shard).read_bytes() != (one.new / shard).read_bytes()
    assert (one.old / shard).stat().st_size == (one.new / shard).stat().st_size


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    """In a process of its own, as its signals want one in which torch has not computed."""
    seed = random.randrange(1 << 20)
    command = [sys.executable, faults.__file__, "--tries", "4", "--seed", str(seed), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("faults-20*-part.json")
    result = json.loads(path.read_text())
    assert {row["group"] for row in result["rows"]} == {
        "signals", "cache entries", "files that change", "reads that fail", "disks that are full or fail",
    }  # fmt: skip
    assert sum(row["wrong"] for row in result["rows"]) == 0
    assert "| all |" in faults.render(result)
