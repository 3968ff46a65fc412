"""Compiled kernels lie in the user's cache folder, by version, and nowhere beside the sources."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import quantload
from quantload.kernels.cpu import cache_folder
from quantload.kernels.cpu.cache_folder import KernelLocator, folder_name, own_folder, user_cache
from quantload.kernels.cpu.compiled import FINGERPRINT

KEY = folder_name(FINGERPRINT)
COMPILE = """
import sys
from quantload.kernels.cpu import ahead
from quantload.kernels.cpu.build.mx import mx_quantize
ahead.prepare([mx_quantize.needed("mxfp8", "default", "bf16", True)])
print(sum(mx_quantize("mxfp8", "default", "bf16", True).stats.cache_misses.values()))
"""


def compile_kernel(package: Path | None = None, **variables: str) -> str:
    """Have a process of its own need a kernel: how many it compiled itself."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR",)} | variables
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cached(folder: Path) -> dict[str, int]:
    """The files numba has written below a folder, with the time of their last change."""
    files = [path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def copy_of_the_package(folder: Path) -> Path:
    """A second install, without the demo model."""
    (source,) = quantload.__path__
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "kernels")
    shutil.copytree(source, folder / "quantload", ignore=ignored)
    shutil.copytree(Path(source, "kernels"), folder / "quantload" / "kernels", ignore=ignored)
    return folder


def test_kernels_are_kept_for_the_user_and_not_beside_the_sources(tmp_path: Path) -> None:
    package, cache = copy_of_the_package(tmp_path / "a"), tmp_path / "cache"
    assert compile_kernel(package, XDG_CACHE_HOME=str(cache)) == "0"  # by another process, which has the same folder
    assert cached(package) == {}
    entries = cached(cache)
    assert {Path(name).parts[:3] for name in entries} == {("quantload", "kernels", KEY)}
    assert compile_kernel(package, XDG_CACHE_HOME=str(cache)) == "0"
    assert cached(cache) == entries


@pytest.mark.slow
def test_installs_of_the_same_kernels_share_and_others_do_not_disturb_them(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, same, other = (copy_of_the_package(tmp_path / name) for name in ("first", "same", "other"))
    with (other / "quantload" / "kernels" / "cpu" / "build" / "mx.py").open("a") as file:
        file.write("# an edit\n")
    for path in (same / "quantload").rglob("*.py"):
        os.utime(path, (0, 0))
    compile_kernel(first, XDG_CACHE_HOME=str(cache))
    entries = cached(cache)
    compile_kernel(same, XDG_CACHE_HOME=str(cache))
    assert cached(cache) == entries
    compile_kernel(other, XDG_CACHE_HOME=str(cache))
    assert entries.items() < cached(cache).items()
    assert len({Path(name).parts[2] for name in cached(cache)}) == 2


def test_the_folder_that_numba_is_told_comes_first(tmp_path: Path) -> None:
    cache, named = tmp_path / "cache", tmp_path / "named"
    assert compile_kernel(XDG_CACHE_HOME=str(cache), NUMBA_CACHE_DIR=str(named)) == "0"
    assert cached(named)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("variable", "home", "want"),
    [
        ("/named", "/me", "/named"),
        (None, "/me", "/me/.cache"),
        ("", "/me", "/me/.cache"),
        ("relative", "/me", "/me/.cache"),
        (None, "~", None),
    ],
)
def test_the_folder_for_caches(
    variable: str | None, home: str, want: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert user_cache() == (None if want is None else Path(want))


def test_the_folder_for_caches_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/Users/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == Path("/Users/me/Library/Caches")


def test_the_folder_is_of_this_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = own_folder(tmp_path / "not yet there", "key")
    finally:
        os.umask(old)
    for made in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert own_folder(tmp_path / "not yet there", "key") == folder


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o1777, False), (0o775, False), (0o702, True)])
def test_a_place_where_everybody_may_replace_folders_is_refused(tmp_path: Path, mode: int, refused: bool) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(mode)
    if refused:
        with pytest.raises(PermissionError, match=r"everybody may replace what is in .*shared"):
            own_folder(root, "key")
        assert list(root.iterdir()) == []
    else:
        assert own_folder(root, "key").is_dir()


@pytest.mark.parametrize("name", ["quantload", "quantload/kernels", "quantload/kernels/key"])
def test_a_link_is_followed_where_this_user_made_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own, to a larger disk; that of another user leads to kernels of his."""
    root = tmp_path / "root"
    own_folder(root, "key")
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    assert own_folder(root, "key").resolve().is_relative_to(tmp_path / "elsewhere")
    if os.geteuid() == 0:
        os.chown(root / name, 12345, 12345, follow_symlinks=False)
    else:
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        own_folder(root, "key")


def test_a_folder_that_was_removed_is_made_anew_for_this_user_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    place = KernelLocator(compile_kernel, __file__, own_folder(root, "key"))
    shutil.rmtree(root)
    umask = os.umask(0)
    try:
        place.ensure_cache_path()
    finally:
        os.umask(umask)
    assert stat.S_IMODE((root / "quantload" / "kernels" / "key").stat().st_mode) == 0o700
    assert own_folder(root, "key").is_dir()


def test_a_folder_that_others_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_folder(tmp_path, "key")
    folder.parent.chmod(0o770)
    with pytest.raises(PermissionError, match="others may write"):
        own_folder(tmp_path, "key")
    folder.parent.chmod(0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"cannot cache .* belongs to another user"):
        KernelLocator.from_function(own_folder, cache_folder.__file__)


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "user_cache", lambda: None)
    with pytest.raises(RuntimeError, match="cannot cache own_folder: this user has no home"):
        KernelLocator.from_function(own_folder, cache_folder.__file__)


def test_functions_of_others_stay_where_numba_puts_them() -> None:
    assert KernelLocator.from_function(compile_kernel, __file__) is None
    assert KernelLocator.from_function(shutil.rmtree, shutil.__file__) is None


def test_the_key_names_python_numba_and_the_sources() -> None:
    import numba

    assert KEY.startswith(sys.implementation.cache_tag or "")
    assert numba.__version__ in KEY
    assert folder_name("0" * 64) != KEY


def test_folders_that_were_used_last_are_kept(tmp_path: Path) -> None:
    for age in range(20):
        folder = own_folder(tmp_path, f"key {age}")
        (folder / "kernel.nbc").write_bytes(b"machine code")
        os.utime(folder, (1e9 - age, 1e9 - age))
    own_folder(tmp_path, "new")
    kept = {path.name for path in (tmp_path / "quantload" / "kernels").iterdir()}
    assert len(kept) == cache_folder.FOLDERS_KEPT
    assert kept == {"new", *(f"key {age}" for age in range(cache_folder.FOLDERS_KEPT - 1))}
