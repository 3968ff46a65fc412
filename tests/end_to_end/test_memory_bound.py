"""The promise: peak anonymous memory <= final + staging + 64 MiB, whatever the size of the largest tensor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import big_checkpoints
import pytest
import torch
from process_state import MIB, status_bytes
from quantized_copies import METHODS, Stored, quantized_copy
from quantload import QuantizationPolicy, convert_checkpoint
from quantload.memory import logs

Checkpoint = Callable[[str], Path]
HERE = Path(__file__).parent
SLACK = 64 * MIB
STAGING = 32 * MIB


@dataclass(frozen=True)
class Measured:
    """What the parent saw of a load: bytes above what the process held before, and what the load said."""

    peak: int
    increase: int
    file_pages: int
    report: dict[str, Any]
    log: str


def measure(
    path: Path | str,
    scheme: str,
    options: dict[str, Any],
    *warm_up: Path | str,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Measured:
    """Load in a child process and sample its memory from here, every half millisecond."""
    command: list[str | Path] = [sys.executable, HERE / "measured_load.py", path, scheme, json.dumps(options), *warm_up]
    surroundings = {**os.environ, **environment}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=surroundings, text=True, bufsize=1
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            log.seek(0)
            pytest.fail(log.read())
        before, files = status_bytes("RssAnon", child.pid), status_bytes("RssFile", child.pid)
        peak, done = before, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.0005):
                peak = max(peak, status_bytes("RssAnon", child.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            child.stdin.write("go\n")
            line = child.stdout.readline()
        finally:
            done.set()
            watcher.join()
        if not line:
            log.seek(0)
            pytest.fail(log.read())
        increase = status_bytes("RssAnon", child.pid) - before
        file_pages = status_bytes("RssFile", child.pid) - files
        child.stdin.write("end\n")
        child.wait(60)
        log.seek(0)
        return Measured(peak - before, increase, file_pages, json.loads(line), log.read())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of BF16: nine ordinary layers in two shards."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    return big_checkpoints.llama(folder, shards=2, hidden_size=1024, intermediate_size=4096, num_hidden_layers=9)


@pytest.fixture(scope="module")
def one_big_tensor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose three MLP matrices are 100 MB each, and 20 MB of embedding and head that are kept."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    sizes = {"hidden_size": 256, "intermediate_size": 200_000, "num_hidden_layers": 1, "vocab_size": 20_000}
    return big_checkpoints.llama(folder, **sizes)


def assert_bounded(measured: Measured, staging: int) -> None:
    """The bound on the peak and the plan's predictions, in any process."""
    report = measured.report
    bound = report["final_bytes"] + staging + SLACK
    sizes = {k: report[k] for k in report if k.endswith("_bytes")}
    assert report["staging_peak_bytes"] <= staging
    assert measured.peak <= bound, f"peak {measured.peak / MIB:.1f} MiB, bound {bound / MIB:.1f} MiB, {sizes}"
    assert measured.peak <= report["predicted_peak_bytes"], sizes
    assert report["predicted_final_bytes"] == pytest.approx(report["final_bytes"], rel=0.02)
    # The model is there, in memory of its own.
    assert measured.increase >= report["final_bytes"] - 8 * MIB


def assert_well_measured(measured: Measured) -> None:
    """In a process that has compiled and imported everything, the load takes what its report says and no more."""
    report = measured.report
    sizes = {k: report[k] for k in report if k.endswith("_bytes")}
    assert report["peak_bytes"] == pytest.approx(measured.peak, abs=8 * MIB), f"peak {measured.peak}, {sizes}"
    assert measured.increase <= report["final_bytes"] + 16 * MIB
    assert measured.file_pages < 16 * MIB, "pages of the checkpoint stay mapped"


LOG_LINES = (
    r"Peak CPU memory before loading weights: \d+\.\d{3} GiB",
    r"Memory increase during load_weights: (?P<increase>\d+\.\d{3}) GiB",
    r"Online quark_mxfp4 quantization: quantized 7 layers of types: (?P<types>\[.*\])",
    r"Peak CPU memory during load_weights: (?P<peak>\d+\.\d{3}) GiB "
    r"\(final (?P<final>\d+\.\d{3}) GiB, staging (?P<staging>\d+\.\d{3}) GiB\)",
    r"Loaded (?P<read>\d+\.\d{2}) GiB in (?P<seconds>\d+\.\d) s \(\d+\.\d{2} GiB/s\)",
)


def assert_log(measured: Measured) -> None:
    lines = measured.log.splitlines()
    found = [next(filter(None, (re.fullmatch(pattern, line) for line in lines)), None) for pattern in LOG_LINES]
    missing = [pattern for pattern, match in zip(LOG_LINES, found, strict=True) if match is None]
    assert not missing, f"{missing} not in:\n{measured.log}"
    numbers = {k: v for match in found if match is not None for k, v in match.groupdict().items()}
    gib, report = 1 << 30, measured.report
    assert float(numbers["final"]) == pytest.approx(report["final_bytes"] / gib, abs=0.0006)
    assert float(numbers["peak"]) == pytest.approx(report["peak_bytes"] / gib, abs=0.0006)
    assert float(numbers["staging"]) == pytest.approx(report["staging_peak_bytes"] / gib, abs=0.0006)
    assert float(numbers["read"]) == pytest.approx(report["bytes_read"] / gib, abs=0.006)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert numbers["types"] == str(sorted(projections))
    parsed = logs.parse(measured.log)
    assert (parsed.kind, parsed.scheme, parsed.quantized_layers) == ("CPU", "quark_mxfp4", 7)
    assert parsed.peak_bytes == pytest.approx(report["peak_bytes"], abs=gib / 1000)
    # In a cold process modeling code and compiled kernels come with the model, and stay.
    assert parsed.increase_bytes == pytest.approx(report["final_bytes"], abs=40 * MIB)


def test_one_big_tensor_from_a_cold_process(one_big_tensor: Path) -> None:
    """Nothing is imported or compiled beforehand: this is what `quantload load` needs."""
    measured = measure(one_big_tensor, "quark_mxfp4", {"staging_bytes": STAGING, "workers": 2})
    assert_bounded(measured, STAGING)
    assert_log(measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", ["quark_mxfp4", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel", "none"]
)
@pytest.mark.parametrize("name", ["dense", "one_big_tensor"])
def test_every_scheme_is_bounded(
    name: str, scheme: str, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    measured = measure(path, scheme, {"staging_bytes": STAGING, "workers": 2}, checkpoint("llama"))
    assert_bounded(measured, STAGING)
    assert_well_measured(measured)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "one_big_tensor"])
def test_a_load_through_transformers_is_bounded_alike(
    name: str, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    options = {"staging_bytes": STAGING, "workers": 2, "through_transformers": True}
    measured = measure(request.getfixturevalue(name), "quark_mxfp4", options, checkpoint("llama"))
    assert_bounded(measured, STAGING)
    assert_well_measured(measured)


@pytest.mark.slow
@pytest.mark.parametrize("staging", [1, 8, 64])
def test_the_arena_is_what_the_user_sets(staging: int, one_big_tensor: Path, checkpoint: Checkpoint) -> None:
    options = {"staging_bytes": staging * MIB, "chunk_bytes": min(8, staging) * MIB // 4, "workers": 2}
    measured = measure(one_big_tensor, "quark_mxfp4", options, checkpoint("llama"))
    assert_bounded(measured, staging * MIB)
    assert_well_measured(measured)


FOUR_FORMATS = {
    "linear": "quark_mxfp4",
    "overrides": [
        ["re:.*[qkv]_proj", "fp8_per_channel"],
        ["*.o_proj", "int4_per_group"],
        ["*.down_proj", "int8_per_channel"],
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "policy"), [("qwen3_moe", {"linear": "quark_int4fp8_moe"}), ("llama", FOUR_FORMATS)])
def test_compiling_kernels_takes_nothing_of_the_bound(
    model: str, policy: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The first load of a format compiles its kernels, and the process that loads is none the larger for it."""
    options = {"staging_bytes": 4 * MIB, "chunk_bytes": MIB, "workers": 2, "policy": policy}
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (measure(checkpoint(model), "auto", options, environment=environment) for _ in range(2))
    assert re.search(r"^Compiled \d CPU kernels in", first.log, re.MULTILINE), first.log
    assert "CPU kernels" not in second.log
    assert_bounded(first, 4 * MIB)
    assert first.peak <= second.peak + 8 * MIB


WIDE_FP8 = "fp8_per_block", "compressed-tensors"


@pytest.fixture(scope="module")
def wide_fp8(one_big_tensor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The big tensors in FP8 blocks."""
    path = tmp_path_factory.mktemp("stored") / "wide"
    convert_checkpoint(one_big_tensor, path, WIDE_FP8[0], format=WIDE_FP8[1])
    return path


@pytest.mark.slow
def test_a_quantized_checkpoint_is_quantized_anew_in_the_same_bounds(wide_fp8: Path, checkpoint: Checkpoint) -> None:
    """Matrices of 50 million weights that are never there in float32."""
    options = {"staging_bytes": STAGING, "chunk_bytes": 4 * MIB}
    assert_bounded(measure(wide_fp8, "quark_mxfp4", options, checkpoint("llama")), STAGING)


@pytest.mark.slow
@pytest.mark.parametrize("anew", ["auto", "fp8_per_tensor", "int8_per_channel", "int4_per_group"])
@pytest.mark.parametrize(
    ("scheme", "form"),
    [WIDE_FP8, ("quark_mxfp4", "quark"), ("fp8_per_channel", "quark"), ("int4_per_group", "compressed-tensors")],
)
@pytest.mark.parametrize("name", ["dense", "one_big_tensor"])
def test_every_quantized_checkpoint_is_bounded(
    name: str, scheme: str, form: str, anew: str, checkpoint: Checkpoint, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    policy = QuantizationPolicy(ignore=("*.down_proj",)) if scheme == "int4_per_group" else None
    convert_checkpoint(request.getfixturevalue(name), tmp_path / "stored", scheme, format=form, policy=policy)
    options = {"staging_bytes": STAGING, "chunk_bytes": 4 * MIB}
    assert_bounded(measure(tmp_path / "stored", anew, options, checkpoint("llama")), STAGING)


def _awq(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Any words, in groups of 16."""
    rows, columns = weight.shape
    parts = {
        "qweight": torch.randint(-(2**31), 2**31, (columns, rows // 8), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (columns // 16, rows // 8), dtype=torch.int32),
        "scales": torch.full((columns // 16, rows), 0.01, dtype=torch.float16),
    }
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, weight


def _nvfp4(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Any codes."""
    rows, columns = weight.shape
    parts = {
        "weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.01),
    }
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}, weight


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), [("awq", "auto"), ("awq", "fp8_per_channel"), ("nvfp4", "quark_mxfp4")])
def test_what_is_converted_on_its_way_is_bounded_in_many_workers(
    method: str, scheme: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Codes are unpacked, scales multiplied: what that takes beside the arena, every worker takes."""
    original = big_checkpoints.llama(tmp_path / "llama", hidden_size=1024, intermediate_size=16384, num_hidden_layers=1)
    quantize = {"awq": _awq, "nvfp4": _nvfp4}[method]
    path, _ = quantized_copy(tmp_path, original, quantize, METHODS[method][1])
    options = {"staging_bytes": 128 * MIB, "chunk_bytes": 8 * MIB, "workers": 8}
    assert_bounded(measure(path, scheme, options, checkpoint("llama")), 128 * MIB)
