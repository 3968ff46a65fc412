"""The bytes that come out do not depend on piece size, worker count or the order in which tensors arrive."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import raw_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_models import state_bytes
from quantload import LoadOptions, load_quantized

Checkpoint = Callable[[str], Path]

# Two-pass schemes need the maximum of the whole tensor or block first; the others need only their own (whole) rows.
SCHEMES = (
    *("quark_mxfp4", "mxfp4_rows", "mxfp6_e3m2", "mxfp8", "fp8_per_tensor", "fp8_per_block", "int8_per_channel"),
    pytest.param("nl4", marks=pytest.mark.slow),
    *("int4_per_group", "quark_int4fp8_moe"),
)
# Experts merged from many tensors; transposed experts; transposed linears; sizes that are not whole blocks; Chunk.
ARCHITECTURES = ("qwen3_moe", "gpt_oss", "gpt_oss_odd", "gpt2", "qwen3_moe_odd", "nomic_bert", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> Callable[[str, str], dict[str, bytes]]:
    """Bytes of the load with one worker and pieces larger than any tensor, in the order of the checkpoint."""

    @cache
    def load(name: str, scheme: str) -> dict[str, bytes]:
        options = LoadOptions(chunk_bytes=8 << 20, workers=1)
        return state_bytes(load_quantized(checkpoint(name), scheme, options=options))

    return load


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    chunk_bytes=st.one_of(st.just(4096), st.integers(4096, 64 << 10), st.integers(64 << 10, 1 << 20)),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    shards=st.integers(1, 5),
)
def test_result_does_not_depend_on_how_it_arrives(
    name: str,
    scheme: str,
    chunk_bytes: int,
    workers: int,
    seed: int,
    shards: int,
    checkpoint: Checkpoint,
    expected: Callable[[str, str], dict[str, bytes]],
) -> None:
    options = LoadOptions(chunk_bytes=chunk_bytes, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        path = raw_checkpoint.shuffled(Path(folder) / "shuffled", checkpoint(name), seed, shards)
        got = state_bytes(load_quantized(path, scheme, options=options))
    want = expected(name, scheme)
    assert got.keys() == want.keys()
    assert [key for key in want if got[key] != want[key]] == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2"])
def test_a_tensor_larger_than_the_arena_gives_the_same_bytes(
    name: str, scheme: str, checkpoint: Checkpoint, expected: Callable[[str, str], dict[str, bytes]]
) -> None:
    """With 4 KiB pieces nearly every tensor is larger than its share and per-tensor scales take two passes."""
    staging = 32768 if scheme == "fp8_per_block" else 8192  # a piece holds whole 128 x 128 blocks
    options = LoadOptions(chunk_bytes=4096, workers=1, staging_bytes=staging)
    model = load_quantized(checkpoint(name), scheme, options=options)
    assert state_bytes(model) == expected(name, scheme)
    assert model.load_report.staging_peak_bytes <= staging


@pytest.mark.parametrize("stats", [True, False])
def test_statistics_do_not_change_the_bytes(
    stats: bool, checkpoint: Checkpoint, expected: Callable[[str, str], dict[str, bytes]]
) -> None:
    model = load_quantized(checkpoint("qwen3_moe"), "quark_mxfp4", options=LoadOptions(stats=stats))
    assert state_bytes(model) == expected("qwen3_moe", "quark_mxfp4")
