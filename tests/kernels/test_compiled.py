"""The fingerprint in the names of compiled functions covers the sources they are generated from, and no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from quantload.kernels.cpu.compiled import sources

KERNELS = Path(__file__).parents[2] / "kernels"

LIST_FILES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps([module.__file__ for name, module in sys.modules.items() if name.startswith("quantload.kernels.")
                  and getattr(module, "__file__", None)]))
"""


def builders() -> list[str]:
    """The modules that hold functions to be compiled."""
    files = [path for path in KERNELS.rglob("*.py") if re.search(r"^\w+ = Compiled\(", path.read_text(), re.MULTILINE)]
    return [".".join(("quantload.kernels", *path.relative_to(KERNELS).with_suffix("").parts)) for path in files]


def test_every_file_that_machine_code_is_generated_from_is_in_the_fingerprint() -> None:
    names = builders()
    assert len(names) > 5
    child = [sys.executable, "-c", LIST_FILES, *names]
    listed = json.loads(subprocess.run(child, capture_output=True, text=True, check=True, timeout=120).stdout)
    files = {Path(file).resolve() for file in listed}
    assert len(files) > 20
    assert files <= {path.resolve() for path in sources()}


def test_an_edit_of_a_gpu_kernel_leaves_the_compiled_cpu_kernels_as_they_are() -> None:
    triton = {path.resolve() for path in KERNELS.rglob("*.py") if "import triton" in path.read_text()}
    assert len(triton) > 5
    assert not triton & {path.resolve() for path in sources()}
