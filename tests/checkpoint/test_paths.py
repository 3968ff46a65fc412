from __future__ import annotations

from pathlib import Path

import pytest
from quantload.checkpoint.paths import check_name, locate
from quantload.errors import UnsafePathError


@pytest.mark.parametrize("name", ["model.safetensors", "sub/model.safetensors", "..model", "a..b/c", "./x"])
def test_names_inside(name: str, tmp_path: Path) -> None:
    check_name(name, "index")
    assert locate(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/x", "//x", "C:/x", "a\\..\\x", "a\nb", "a\0"])
def test_names_outside(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafePathError, match="do not trust"):
        check_name(name, "index")
    with pytest.raises(UnsafePathError, match="do not trust"):
        locate(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"")
    (root / "file").write_bytes(b"")
    (root / "inside").symlink_to("file")
    (root / "out").symlink_to("../outside")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    assert locate(root, "inside") == root / "inside"
    (tmp_path / "alias").symlink_to(root)
    assert locate(tmp_path / "alias", "file") == tmp_path / "alias" / "file"
    for name in ("out", "folder/outside"):
        with pytest.raises(UnsafePathError, match="outside the checkpoint folder"):
            locate(root, name)


def test_only_a_snapshot_may_link_to_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"")
    for kind in ("snapshots", "other"):
        (tmp_path / kind / "abc").mkdir(parents=True)
        (tmp_path / kind / "abc" / "w").symlink_to("../../blobs/1")
    locate(tmp_path / "snapshots" / "abc", "w")
    with pytest.raises(UnsafePathError):
        locate(tmp_path / "other" / "abc", "w")
