"""Whatever stands in a config or a header, a checkpoint is read or refused, and nothing else goes wrong."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stored_tensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError, UnsupportedCheckpointError
from quantload.schemes.stored.read import read_stored
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "stored"
NAMES = ("ct_llama_fp8_block", "ct_made", "native_gptoss_mxfp4", "native_llama_awq", "native_llama_blockfp8",
         "native_llama_gptq", "quark_llama_int4_fp8", "quark_llama_int8", "quark_qwen3moe_mxfp4")  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, -1, 0, 1, 3.5, "", "x", "re:(", [], [1], ["a", None], [[]], {}, {"a": 1}]
)


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every key of nested objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.fixture(scope="module", params=NAMES)
def stored(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = load_file(DATA / request.param / "model.safetensors")
    return json.loads((DATA / request.param / "config.json").read_text()), tensors


def attempt(config: dict[str, Any], entries: dict[str, TensorEntry], tensors: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError, UnsupportedCheckpointError):
        read_stored(config, entries, lambda entry: tensors[entry.name])


@given(st.data(), VALUES)
@settings(max_examples=60, deadline=None)
def test_any_value_in_a_config(
    stored: tuple[dict[str, Any], dict[str, Tensor]], data: st.DataObject, value: object
) -> None:
    config, tensors = copy.deepcopy(stored[0]), stored[1]
    *path, last = data.draw(st.sampled_from(list(places(config))))
    place: Any = config
    for key in path:
        place = place[key]
    place[last] = value
    attempt(config, stored_tensors.entries(tensors), tensors)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_dtype_in_a_header(stored: tuple[dict[str, Any], dict[str, Tensor]], data: st.DataObject) -> None:
    config, tensors = stored
    entries = stored_tensors.entries(tensors)
    name = data.draw(st.sampled_from(sorted(entries)))
    shape = data.draw(st.lists(st.integers(0, 20), max_size=4))
    dtype = data.draw(st.sampled_from([entries[name].dtype, torch.float32, torch.uint8, torch.int32]))
    changed = torch.zeros(shape, dtype=dtype) if data.draw(st.booleans()) else None
    del entries[name]
    if changed is not None:
        entries |= stored_tensors.entries({name: changed})
    attempt(config, entries, {**tensors, name: changed})
