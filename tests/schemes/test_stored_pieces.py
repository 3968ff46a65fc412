"""A stored weight converted piece by piece is what it is converted whole, by the `block` of parts and the `step`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import stored_tensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.schemes.stored.weights import StoredWeight
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "stored"


@pytest.fixture(scope="module", params=sorted(path.name for path in DATA.iterdir() if path.is_dir()))
def stored(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], list[StoredWeight]]:
    config = json.loads((DATA / request.param / "config.json").read_text())
    tensors = load_file(DATA / request.param / "model.safetensors")
    return tensors, list(stored_tensors.read(config["quantization_config"], tensors).weights.values())


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_pieces_are_the_whole(stored: tuple[dict[str, Tensor], list[StoredWeight]], data: st.DataObject) -> None:
    tensors, weights = stored
    weight = data.draw(st.sampled_from([weight for weight in weights if weight.experts is None] or weights))
    extent = weight.rows * (weight.experts or 1) if weight.along == "rows" else weight.columns
    step = max(weight.step, weight.format.block_rows) if weight.along == "rows" else weight.step
    cuts = data.draw(st.lists(st.integers(1, max(1, extent // step - 1)), max_size=3, unique=True))
    edges = sorted({0, extent, *(cut * step for cut in cuts if cut * step < extent)})
    for part in weight.parts:
        whole = stored_tensors.converted(part, tensors)
        matrix = stored_tensors.matrix(part, tensors)
        if part.block == 0 or part.convert is None:
            assert part.block or len(matrix) == 1
            continue
        pieces = [part.convert(matrix[a // part.block : -(-b // part.block)]) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat(pieces, dim=0 if weight.along == "rows" else 1), whole)
