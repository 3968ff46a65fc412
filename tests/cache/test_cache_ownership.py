"""A cache in a folder that others can reach: their entries are not believed, and their links are not followed."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from quantload import LoadOptions, load_quantized
from quantload.cache.checksums import Checksums
from quantload.cache.locks import FileLock
from quantload.cache.store import WRITING, Store
from quantload.errors import DamagedEntryError

A, B = "a" * 64, "b" * 64
Give = Callable[[Path], None]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """One that would let a group write to all that is made."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Makes a path another user's, or this process one of another user, where it may not do that."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345, follow_symlinks=False)
        else:
            user = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: user + 1)

    return give


def publish(store: Store, key: str, content: bytes = b"tensors") -> None:
    unfinished = store.reserve(key, 1000)
    (unfinished.folder / "model").write_bytes(content)
    checksums = Checksums((0, len(content)))
    checksums.note(0, memoryview(content))
    unfinished.publish({"note.json": b"{}"}, {"model": checksums})


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}


def test_what_a_load_leaves_is_for_its_user_alone(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever the umask."""
    cache = tmp_path / "deep" / "cache"
    load_quantized(checkpoint("llama"), options=LoadOptions(cache=cache))
    found = modes(cache.parent)
    assert len(found) == 9
    assert {mode for name, mode in found.items() if (cache.parent / name).is_dir()} == {0o700}
    assert {mode for name, mode in found.items() if (cache.parent / name).is_file()} == {0o600}


def test_a_root_of_another_user_is_neither_read_nor_written(tmp_path: Path, give_away: Give) -> None:
    store = Store(tmp_path / "cache")
    publish(store, A)
    before = modes(store.root)
    give_away(store.root)
    with pytest.raises(
        PermissionError, match=r"cache belongs to another user \(uid \d+\), who could put other weights"
    ):
        store.find(A)
    for key in (A, B):
        with pytest.raises(PermissionError, match="belongs to another user"):
            store.reserve(key, 1000)
    assert modes(store.root) == before


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o720])
def test_a_root_that_others_may_write_to_is_neither_read_nor_written(tmp_path: Path, mode: int) -> None:
    store = Store(tmp_path / "cache")
    publish(store, A)
    store.root.chmod(mode)
    for use in (lambda: store.find(A), lambda: store.reserve(B, 1000)):
        with pytest.raises(PermissionError, match=r"others may write to .*cache, and could .*'chmod go-w' it"):
            use()
    store.root.chmod(0o755)
    entry = store.find(A)
    assert entry is not None
    entry.release()


@pytest.mark.parametrize("how", ["given away", "for others to write", "a link", "another key"])
def test_an_entry_that_others_could_have_made_is_written_anew(tmp_path: Path, how: str, give_away: Give) -> None:
    store = Store(tmp_path / "cache")
    publish(store, A)
    folder = store.root / A
    if how == "given away":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        give_away(folder)
    elif how == "for others to write":
        folder.chmod(0o770)
    elif how == "a link":
        folder.rename(tmp_path / A)
        folder.symlink_to(tmp_path / A)
    else:
        publish(store, B)
        (store.root / B).rename(tmp_path / "gone")
        folder.rename(store.root / B)
    key = B if how == "another key" else A
    with pytest.raises(DamagedEntryError, match=r"another user|others may write|is a link|the entry of another key"):
        store.find(key)
    publish(store, key, b"right")
    entry = store.find(key)
    assert entry is not None
    assert entry.source(LoadOptions()).size("model") == 5
    entry.release()
    if how == "a link":
        assert (tmp_path / A / "model").read_bytes() == b"tensors"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_lock_of_another_user(tmp_path: Path, give_away: Give) -> None:
    store = Store(tmp_path / "cache")
    publish(store, A)
    give_away(store.root / A / "lock")
    with pytest.raises(DamagedEntryError, match=r"lock is a link, belongs to another user, or is no file"):
        store.find(A)
    publish(store, A, b"right")
    assert store.find(A) is not None


@pytest.mark.parametrize("place", ["root", "entry", "writing"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_nothing_is_done_to_what_a_lock_is_a_link_to(tmp_path: Path, place: str, kind: str) -> None:
    store, precious = Store(tmp_path / "cache"), tmp_path / "precious"
    publish(store, A)
    precious.write_text("precious")
    before = precious.stat().st_mtime_ns
    folder = {"root": store.root, "entry": store.root / A, "writing": store.root / f"{WRITING}{A}"}[place]
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = folder / "lock"
    lock.unlink(missing_ok=True)
    if kind.endswith("link") and kind != "hard link":
        lock.symlink_to(precious if kind == "link" else tmp_path / "nowhere")
    elif kind == "hard link":
        lock.hardlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    uses: list[Callable[[], object]] = [lambda: store.find(A), lambda: publish(store, A), lambda: store.find(A)]
    for use in uses:
        with contextlib.suppress(OSError, DamagedEntryError):
            use()
    assert precious.read_text() == "precious"
    assert precious.stat().st_mtime_ns == before
    assert not (tmp_path / "nowhere").exists()


def test_a_link_of_ones_own_may_lead_to_the_cache(tmp_path: Path, give_away: Give) -> None:
    (tmp_path / "large disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("large disk")
    store = Store(tmp_path / "link")
    publish(store, A)
    entry = store.find(A)
    assert entry is not None
    entry.release()
    if os.geteuid() == 0:
        give_away(tmp_path / "link")
        for use in (lambda: store.find(A), lambda: store.reserve(B, 1000)):
            with pytest.raises(PermissionError, match="link is a link; give the folder itself"):
                use()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of root and a user who is not")
def test_what_root_left_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator can lay out entries, which users may only read; root could change anything anyway."""
    store = Store(tmp_path / "cache")
    publish(store, A)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    entry = store.find(A)
    assert entry is not None
    entry.release()


def test_a_load_goes_on_without_a_cache_of_others(
    checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where everybody may write, an entry may be anybody's."""
    cache = tmp_path / "shared"
    cache.mkdir()
    right = load_quantized(checkpoint("llama"))
    cache.chmod(0o755)
    load_quantized(checkpoint("llama"), options=LoadOptions(cache=cache))
    cache.chmod(0o777)
    caplog.set_level(logging.WARNING, "quantload")
    model = load_quantized(checkpoint("llama"), options=LoadOptions(cache=cache))
    assert model.load_report.cache == "unwritten"
    assert f"Cache: {cache} cannot be read: others may write to {cache}" in caplog.text
    assert f"Cache: nothing was written to {cache}: others may write to {cache}" in caplog.text
    found, expected = model.state_dict(), right.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_lock_says_what_it_is_told(tmp_path: Path) -> None:
    lock = FileLock.exclusive(tmp_path / "lock", create=True)
    assert lock is not None
    for number in (123_456, 7):
        lock.note(number)
        assert (tmp_path / "lock").read_text() == str(number)
    lock.release()
