"""What macOS and Windows lack is taken away: the bytes are the same, and what cannot be had there says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quantload import LoadOptions, load_quantized
from quantload.cli import DEMO_MODEL

HERE = Path(__file__).parent


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
