"""What stands in for what a machine without a GPU has not, and the entry point of this tree."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

STUBS = Path(__file__).parent / "stubs"
GROUP = "sglang.srt.plugins"

if any(metadata.distributions(name="sglang")):  # elsewhere nobody may find a torchvision that is none
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    sys.path.insert(0, str(STUBS))


@pytest.fixture(scope="session")
def python_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH for an engine's processes: the stand-ins, this tree, and its entry point where it is not installed."""
    parts = [str(STUBS)]
    if not any(entry.name == "quantload" for entry in metadata.entry_points(group=GROUP)):
        folder = tmp_path_factory.mktemp("entry_point") / "quantload-0.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: quantload\nVersion: 0.0\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\nquantload = quantload.engines.sglang:register\n")
        parts.append(str(folder.parent))
    return os.pathsep.join([*parts, *filter(None, [os.environ.get("PYTHONPATH")])])
