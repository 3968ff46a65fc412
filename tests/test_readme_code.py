"""The Python that the README shows runs, and a strict type checker has nothing to say about it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantload
from quantload.cli import DEMO_MODEL
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_readme_shows_python() -> None:
    assert BLOCKS
    assert any("load_quantized(" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_in_the_readme_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def of_the_demo_model(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_demo(model: str, *arguments: Any, **options: Any) -> Any:
            loaded.append(model)
            return load(DEMO_MODEL, *arguments, **options)

        return load_demo

    monkeypatch.setattr(quantload, "load_quantized", of_the_demo_model(quantload.load_quantized), raising=False)
    from_pretrained = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", of_the_demo_model(from_pretrained))
    exec(compile(block, "README.md", "exec"), {})
    assert len(loaded) == block.count("load_quantized(") + block.count("from_pretrained(")


@pytest.mark.slow
def test_python_in_the_readme_passes_mypy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "quantload").symlink_to(ROOT / "loader")
    files = []
    for number, block in enumerate(BLOCKS):
        files.append(tmp_path / f"readme_{number}.py")
        files[-1].write_text(f"{block}\nreveal_type(load_quantized('x'))\n")
    monkeypatch.setenv("MYPYPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml", *files],
        capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("quantload.quantized_model.QuantizedModel") == len(BLOCKS)
