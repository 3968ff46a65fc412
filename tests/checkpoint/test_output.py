"""A folder that is there when it is complete, and work that goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from forced_to_disk import Disk
from quantload.checkpoint.output import OutputFolder
from quantload.checkpoint.writer import ShardPlan, ShardWriter, TensorSpec, plan_shards
from quantload.errors import OutputError

PLANS = plan_shards([[TensorSpec(name, torch.uint8, (4,))] for name in "ab"], 4)


def write(folder: OutputFolder, plan: ShardPlan) -> None:
    writer = ShardWriter(folder.files, plan, 1, lambda plan, extents: folder.record(plan, extents, {"of": plan.path}))
    writer.write(len(plan.header), torch.arange(4, dtype=torch.uint8).view(1, 4), 4)
    writer.done()


def interrupted(out: Path, key: str = "key") -> None:
    """One of two shards is finished, the other one begun."""
    with contextlib.suppress(KeyboardInterrupt), OutputFolder(out, key) as folder:
        write(folder, PLANS[0])
        (folder.files / f"{PLANS[1].path}.part").write_bytes(b"half")
        raise KeyboardInterrupt


def test_it_appears_when_it_is_published(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "deep/out", "key") as folder:
        for plan in PLANS:
            write(folder, plan)
        folder.write("config.json", [b"{}"])
        folder.write("sub/small.json", [b"{", bytearray(b"}")])
        assert not (tmp_path / "deep/out").exists()
        folder.publish()
    assert os.listdir(tmp_path / "deep") == ["out"]
    names = {str(path.relative_to(tmp_path / "deep/out")) for path in (tmp_path / "deep/out").rglob("*")}
    assert names == {"config.json", "sub", "sub/small.json", *(plan.path for plan in PLANS)}


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power leaves nothing that looks finished, and no line about a shard that is not."""
    disk = Disk(monkeypatch)
    with OutputFolder(tmp_path / "out", "key") as folder:
        for plan in PLANS:
            write(folder, plan)
            assert disk.holds(folder.files.with_name("journal.jsonl"))
        folder.write("config.json", [b"{}"])
        folder.write("sub/small.json", [b"{", bytearray(b"}")])
        folder.publish()
    assert disk.renamed == [*(plan.path for plan in PLANS), "out"]
    assert disk.lacking == []


def test_finished_shards_are_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path / "out")
    stay = f"weights (1) stay in {tmp_path / 'out.unfinished'}: the same conversion, run again, goes on from there"
    assert stay in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["out.unfinished"]
    assert os.listdir(tmp_path / "out.unfinished/files") == [PLANS[0].path]
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert [folder.finished(plan) for plan in PLANS] == [{"of": PLANS[0].path}, None]


def test_a_killed_run_leaves_what_the_next_one_clears(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    journal = tmp_path / "out.unfinished/journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'\n{"shard": "model-00002-of')
    (tmp_path / "out.unfinished/files" / f"{PLANS[1].path}.part").write_bytes(b"more than the shard will ever have" * 9)
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert [folder.finished(plan) for plan in PLANS] == [{"of": PLANS[0].path}, None]
        write(folder, PLANS[1])
        folder.publish()
    assert sorted(os.listdir(tmp_path / "out")) == [plan.path for plan in PLANS]
    assert (tmp_path / "out" / PLANS[1].path).stat().st_size == PLANS[1].size


def test_a_bit_flipped_anywhere_in_the_journal_costs_a_shard_and_nothing_else(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    journal, shard = tmp_path / "out.unfinished/journal.jsonl", tmp_path / "out.unfinished/files" / PLANS[0].path
    intact, content = journal.read_bytes(), shard.read_bytes()
    for position in range(0, len(intact), 3):
        journal.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with OutputFolder(tmp_path / "out", "key") as folder:
            assert folder.finished(PLANS[0]) is None or journal.read_bytes() == intact, position
        shard.parent.mkdir(parents=True, exist_ok=True)  # nothing was finished: nothing is left
        shard.write_bytes(content)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"[]", b"null", b"17", b'"shard"', b"{}", b'{"shard": "model.safetensors"}', b"\xff\xfe", b"[" * 100_000,
        b'{"shard": 5, "extents": [], "notes": {}}', b'{"shard": "a", "extents": [[1]], "notes": null}', b"0" * 99,
    ],
)  # fmt: skip
def test_lines_that_nobody_wrote_are_passed_over(line: bytes, tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    journal = tmp_path / "out.unfinished/journal.jsonl"
    journal.write_bytes(line + b"\n" + journal.read_bytes() + b"\n" + line)
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert [folder.finished(plan) for plan in PLANS] == [{"of": PLANS[0].path}, None]


def test_a_shard_whose_line_vouches_for_a_part_of_it_only_is_written_again(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), OutputFolder(tmp_path / "out", "key") as folder:
        writer = ShardWriter(folder.files, PLANS[0], 1, lambda plan, extents: folder.record(plan, [], {}))
        writer.write(len(PLANS[0].header), torch.arange(4, dtype=torch.uint8).view(1, 4), 4)
        writer.done()
        raise KeyboardInterrupt
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert folder.finished(PLANS[0]) is None


def put(kind: str, path: Path, target: Path) -> None:
    """Something of others in the place of one of our files."""
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target.with_name("nowhere"))
    elif kind == "hard link":
        path.hardlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_a_link_in_place_of_the_journal_is_not_followed(kind: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    work = tmp_path / "out.unfinished"
    work.mkdir()
    put(kind, work / "journal.jsonl", tmp_path / "precious")
    with pytest.raises(OutputError, match=r"journal\.jsonl (is a link, belongs to another|cannot be written)"):
        OutputFolder(tmp_path / "out", "key").__enter__()
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["out.unfinished", "precious"]


@pytest.mark.parametrize("name", ["out.unfinished", "out.unfinished/files"])
@pytest.mark.parametrize("key", ["key", "another key"])
def test_a_link_in_place_of_a_folder_is_not_followed(name: str, key: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "elsewhere").rglob("*")}
    with pytest.raises(OutputError, match=r"is a link, belongs to another user, or is no folder"):
        OutputFolder(tmp_path / "out", key).__enter__()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "elsewhere").rglob("*")} == before


def test_what_another_user_left_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "out")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(OutputError, match=r"out\.unfinished is a link, belongs to another user"):
        OutputFolder(tmp_path / "out", "key").__enter__()


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe"])
@pytest.mark.parametrize("name", [f"{PLANS[0].path}.part", "config.json", PLANS[0].path])
def test_a_link_in_place_of_a_file_is_replaced(kind: str, name: str, tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), OutputFolder(tmp_path / "out", "key") as folder:
        write(folder, PLANS[1])
        raise KeyboardInterrupt
    (tmp_path / "precious").write_text("precious")
    put(kind, tmp_path / "out.unfinished/files" / name, tmp_path / "precious")
    with OutputFolder(tmp_path / "out", "key") as folder:
        write(folder, PLANS[0])
        folder.write("config.json", [b"{}"])
        folder.publish()
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", *(plan.path for plan in PLANS)]
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_link_to_a_finished_shard_is_not_taken_up(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    path = tmp_path / "out.unfinished/files" / PLANS[0].path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert folder.finished(PLANS[0]) is None


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "posix_fallocate", "pwrite", "fdatasync", "mkdir"])
def test_a_disk_that_says_no_is_an_error_and_the_next_run_goes_on(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time the call is made, one after the other, until it is made no more."""
    original, at = getattr(os, call), 0
    while not (tmp_path / "out").exists():
        at += 1
        made = iter(range(1, 1000))

        def failing(*args: Any, made: Iterator[int] = made, at: int = at) -> Any:
            if next(made) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args)

        with monkeypatch.context() as patch, contextlib.suppress(OutputError):
            patch.setattr(os, call, failing)
            published(tmp_path / "out")
        assert at < 30
    assert at > 1 or call == "mkdir"
    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == {
        plan.path: plan.size for plan in PLANS
    }
    assert os.listdir(tmp_path) == ["out"]


def test_a_line_that_the_disk_takes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: original(fd, data[:7]))
        interrupted(tmp_path / "out")
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert [folder.finished(plan) for plan in PLANS] == [{"of": PLANS[0].path}, None]


def test_another_key_starts_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with OutputFolder(tmp_path / "out", "another key") as folder:
        assert [folder.finished(plan) for plan in PLANS] == [None, None]
        assert os.listdir(folder.files) == []
    assert os.listdir(tmp_path) == []


def test_a_damaged_shard_is_written_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    path = tmp_path / "out.unfinished/files" / PLANS[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with OutputFolder(tmp_path / "out", "key") as folder:
        assert folder.finished(PLANS[0]) is None


def test_nothing_is_left_where_nothing_was_finished(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputFolder(tmp_path / "out", "key"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_out_must_not_exist(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("nowhere")
    with pytest.raises(OutputError, match="out exists; give a folder that does not, or remove it first"):
        OutputFolder(out, "key").__enter__()
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    with (
        OutputFolder(tmp_path / "out", "key"),
        pytest.raises(OutputError, match=r"another run is writing .*out; wait for it"),
    ):
        OutputFolder(tmp_path / "out", "key").__enter__()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "out.unfinished"
    other.mkdir()
    (other / "diary.txt").touch()
    with pytest.raises(OutputError, match=r"out\.unfinished holds diary\.txt, which is none of ours"):
        OutputFolder(tmp_path / "out", "key").__enter__()
    assert os.listdir(other) == ["diary.txt"]


def test_out_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "key") as folder:
        write(folder, PLANS[0])
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").touch()
        with pytest.raises(OutputError, match="cannot be written"):
            folder.publish()
    assert os.listdir(tmp_path / "out") == ["precious"]


def published(out: Path) -> None:
    with OutputFolder(out, "key") as folder:
        for plan in PLANS:
            write(folder, plan)
        folder.publish()


def test_a_run_that_looked_before_another_one_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT was not there when it looked, and is there when it holds the journal: all the work would be for nothing."""
    published(tmp_path / "out")
    looks = iter((False, True, True))
    monkeypatch.setattr(os.path, "lexists", lambda path: next(looks))
    with (
        pytest.raises(OutputError, match="out exists; give a folder that does not"),
        OutputFolder(tmp_path / "out", "k"),
    ):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_opened_the_journal_before_another_one_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    took: list[int] = []

    def after_the_other(fd: int, operation: int) -> None:
        if not took:
            took.append(fd)
            published(tmp_path / "out")  # opens the same journal, and removes it in the end
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_other)
    with pytest.raises(OutputError, match=r"another run is writing .*out"), OutputFolder(tmp_path / "out", "key"):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_ends_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """The next one begins as soon as the first has published or given up."""
    first = OutputFolder(tmp_path / "out", "key").__enter__()
    first.publish()
    (tmp_path / "out").rmdir()
    with OutputFolder(tmp_path / "out", "key") as second:
        first.__exit__(None, None, None)
        for plan in PLANS:
            write(second, plan)
        second.publish()
    assert sorted(os.listdir(tmp_path / "out")) == sorted(plan.path for plan in PLANS)


def test_runs_at_once(tmp_path: Path) -> None:
    """One writes, the others are told so or find it done; `flock` is by open file, threads will do."""
    for number in range(20):
        out = tmp_path / f"out{number}"

        def run(_: int, out: Path = out) -> str:
            try:
                published(out)
            except OutputError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(run, range(4)))
        assert told.count("") == 1, told
        assert all("exists" in text or "another run" in text or "cannot be written" in text for text in told if text)
        assert sorted(os.listdir(out)) == sorted(plan.path for plan in PLANS)
    assert sorted(os.listdir(tmp_path)) == sorted(f"out{number}" for number in range(20))
