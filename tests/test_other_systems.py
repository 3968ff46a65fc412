"""What macOS and Windows lack is taken away: the bytes are the same, and what cannot be had there says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from another_system import ABSENT, MISSING
from quantload import LoadOptions, load_quantized
from quantload.cli import DEMO_MODEL

GUARDED = {
    "os.RWF_NOWAIT", "os.major", "os.minor", "os.pread",
    *(f"mmap.{name}" for name in ("MADV_HUGEPAGE", "MADV_DONTNEED", "MAP_PRIVATE", "MAP_ANONYMOUS")),
}  # fmt: skip
"""What a module asks for itself whether it is there, or asks for on Linux only."""
HERE = Path(__file__).parent


MODULES = [*(HERE.parent / "kernels").rglob("*.py"), *(HERE.parent / "loader").rglob("*.py")]


@pytest.mark.parametrize("system", MISSING)
def test_only_one_module_names_what_another_system_lacks(system: str) -> None:
    missing = {f"{module}.{name}" for module, names in MISSING[system].items() for name in names} - GUARDED
    pattern = re.compile(r"^import (\w+)$|^from (\w+) import|\b(\w+\.\w+)\b", re.MULTILINE)
    found = [
        f"{path.name}: {name}"
        for path in MODULES
        if path.name != "system_calls.py" and "jit" not in path.parts
        for name in {name for match in pattern.finditer(path.read_text()) for name in match.groups() if name}
        if name in missing or name in ABSENT[system]
    ]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("system", ["macos", "windows"])
def test_the_demo_model_is_loaded_converted_cached_and_served_without_what_another_system_lacks(
    system: str, tmp_path: Path
) -> None:
    digest = load_quantized(DEMO_MODEL, options=LoadOptions(digest=True)).load_report.digest
    done = subprocess.run(
        [sys.executable, HERE / "another_system.py", system, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE / "server"), *sys.path])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["names"] == []
    assert (found["loaded"], found["dropped"], found["converted"]) == (digest, digest, digest)
    status, text = found["served"]
    assert (status, bool(text)) == (200, True)
    if system == "macos":
        assert found["cached"] == [["written", digest], ["hit", digest]]
        assert found["left"] == ["cache", "out"]
    else:
        assert "no locks that several processes hold together" in found["cached"]
        assert found["left"] == ["out"]
