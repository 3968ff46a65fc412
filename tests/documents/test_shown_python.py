"""Every block of Python in README.md and docs/ that is not marked runs here, on the demo model."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import quantload
import torch
from quantload.cli import DEMO_MODEL
from quantload.memory.assertions import assert_load_memory
from safetensors.torch import load_file
from shown_code import BLOCKS, Block
from torch import Tensor

pytestmark = pytest.mark.slow
PYTHON = [block for block in BLOCKS if block.kind == "python"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Those of the demo model, as its checkpoint has them."""
    found: dict[str, Tensor] = {}
    for shard in sorted(DEMO_MODEL.glob("*.safetensors")):
        found.update(load_file(shard))
    return found


@pytest.fixture
def given(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
    """What blocks take for granted: names that a reader has, by what the text around the block says of them."""
    return {
        "trainer": types.SimpleNamespace(state_dict=lambda: tensors),
        "norm": tensors["model.norm.weight"],
        "buckets": list(halves(tensors)),
        "tokens": torch.arange(1, 33).view(1, -1),
    }


def halves(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    names = list(tensors)
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        yield {name: tensors[name] for name in part}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(
    block: Block, in_named_files: Path, given: Mapping[str, Any], request: pytest.FixtureRequest
) -> None:
    if "s3://" in block.text:
        request.getfixturevalue("bucket")
    names = dict(given)
    code = compile(block.text, str(block), "exec")
    free = set(code.co_names) | {name for each in code.co_consts if hasattr(each, "co_names") for name in each.co_names}
    if "model" in free and "model =" not in block.text:
        names["model"] = quantload.load_quantized(DEMO_MODEL)
    if "log_or_report" in free:
        names["log_or_report"] = quantload.load_quantized(DEMO_MODEL).load_report
    exec(code, names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    for test in tests:
        test(assert_load_memory)
    model = names.get("model")
    assert tests or isinstance(model, torch.nn.Module)
    if "load_quantized(" in block.text:
        assert names["model"].load_report.state == "complete"
