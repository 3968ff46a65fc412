from __future__ import annotations

import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.errors import QuantloadError
from quantload.memory import logs
from quantload.memory.amounts import GIB
from quantload.memory.logs import MemoryLog, layer_types, parse, parse_all

HALF_DIGIT = 0.0005 * GIB + 1

DESIGN_LINES = """\
Peak GPU memory before loading weights: 0.000 GiB
Memory increase during load_weights: 5.755 GiB
Online quark_mxfp4 quantization: quantized 252 layers of types: ['down_proj', 'gate_up_proj']
Peak GPU memory during load_weights: 5.790 GiB (final 5.755 GiB, staging 0.031 GiB)
Loaded 15.27 GiB in 3.1 s (4.93 GiB/s)
"""

SGLANG_LINES = """\
[2026-11-21 10:00:00] Load weight begin. avail mem=250.97 GB
[2026-11-21 10:00:01] Peak GPU memory before loading weights: 1.204 GiB
Loading safetensors checkpoint shards: 100% Completed | 5/5 [00:03<00:00,  1.53it/s]
[2026-11-21 10:00:09] Memory increase during load_weights: -0.125 GiB
[2026-11-21 10:00:09] Load weight end. elapsed=8.41 s, type=Qwen3ForCausalLM, quant=quark, avail mem=245.01 GB, \
mem usage=5.96 GB.
[2026-11-21 10:00:09] Online quark_mxfp4 quantization: quantized 252 layers of types: {'ReplicatedLinear', "QKV"}
[2026-11-21 10:00:10] KV Cache is allocated. #tokens: 1024, K size: 1.00 GB, V size: 1.00 GB
"""


def gib(number: float) -> int:
    return round(number * GIB)


def emit_all() -> None:
    logs.log_before("GPU", 0)
    logs.log_increase(gib(5.755))
    logs.log_quantized("quark_mxfp4", 252, ["gate_up_proj", "down_proj", "gate_up_proj"])
    logs.log_peak("GPU", gib(5.79), gib(5.755), gib(0.031))
    logs.log_loaded(gib(15.27), 3.1)


def test_lines_are_those_of_the_design(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quantload"):
        emit_all()
    assert [record.getMessage() for record in caplog.records] == DESIGN_LINES.splitlines()
    assert {(record.name, record.levelname) for record in caplog.records} == {("quantload", "INFO")}


def test_sglang_tests_find_their_numbers(caplog: pytest.LogCaptureFixture) -> None:
    """The first two lines satisfy expressions of the form SGLang's memory tests use; its sign is optional."""
    with caplog.at_level(logging.INFO, logger="quantload"):
        emit_all()
    before = re.search(r"Peak GPU memory before loading weights:\s+([\d.]+)\s+GiB", caplog.text)
    increase = re.search(r"Memory increase during load_weights:\s+(-?[\d.]+)\s+GiB", caplog.text)
    assert before is not None
    assert increase is not None
    assert float(before[1]) + float(increase[1]) == 5.755


def test_design_lines_parse() -> None:
    assert parse(DESIGN_LINES) == MemoryLog(
        kind="GPU",
        peak_before_bytes=0,
        increase_bytes=gib(5.755),
        peak_bytes=gib(5.79),
        final_bytes=gib(5.755),
        staging_bytes=gib(0.031),
        scheme="quark_mxfp4",
        quantized_layers=252,
        layer_types=("down_proj", "gate_up_proj"),
        loaded_bytes=gib(15.27),
        seconds=3.1,
        bytes_per_second=4.93 * GIB,
    )


def test_sglang_lines_parse() -> None:
    log = parse(SGLANG_LINES)
    assert (log.kind, log.rank) == ("GPU", None)
    assert log.peak_before_bytes == gib(1.204)
    assert log.increase_bytes == gib(-0.125)  # the exact line, not "mem usage"
    assert log.reference_bytes == gib(1.204) + gib(-0.125)
    assert (log.scheme, log.quantized_layers, log.layer_types) == ("quark_mxfp4", 252, ("ReplicatedLinear", "QKV"))
    assert log.seconds == 8.41
    assert log.peak_bytes is None


def test_sglang_at_info_still_has_its_increase() -> None:
    text = (
        "Load weight begin. avail mem=24.76 GB\nLoad weight end. elapsed=74.33 s, avail mem=3.38 GB, mem usage=21.38 GB"
    )
    log = parse(text)
    assert (log.increase_bytes, log.seconds, log.peak_before_bytes) == (gib(21.38), 74.33, None)
    assert parse("Load weight end. elapsed=2.00 s").seconds == 2.0
    assert parse_all("Load weight end. Committed real weights after CUDA graph capture in 3.21 s") == ()


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "2026-11-21 10:00:00,123 INFO quantload: ",
        "INFO:quantload:",
        "(EngineCore_0 pid=77) INFO 11-21 10:00:00 [loader.py:12] ",
        "\x1b[32m[2026-11-21 10:00:00]\x1b[0m ",
        '{"level": "info", "message": "',
    ],
)
def test_what_stands_before_a_line_does_not_matter(prefix: str) -> None:
    assert parse("\n".join(prefix + line for line in DESIGN_LINES.splitlines())) == parse(DESIGN_LINES)


def test_wrapped_lines_and_windows_line_ends_parse() -> None:
    assert parse(DESIGN_LINES.replace("\n", "\r\n")) == parse(DESIGN_LINES)
    assert parse("Memory increase during\n      load_weights: 5.755\n      GiB").increase_bytes == gib(5.755)


def test_the_last_of_several_loads_wins() -> None:
    later = DESIGN_LINES.replace("5.755", "6.000").replace("GPU", "CPU")
    assert [log.increase_bytes for log in parse_all(DESIGN_LINES + later)] == [gib(5.755), gib(6)]
    assert parse(DESIGN_LINES + later).kind == "CPU"
    # Without the line that begins a load, a repeated line does.
    assert len(parse_all("Memory increase during load_weights: 1.000 GiB\n" * 3)) == 3
    # SGLang loads its draft model with the same lines.
    assert len(parse_all(SGLANG_LINES + SGLANG_LINES)) == 2


def test_interleaved_ranks_are_told_apart() -> None:
    text = """\
[2026-02-26 05:24:00 TP0] Peak GPU memory before loading weights: 0.100 GiB
[2026-02-26 05:24:00 TP1] Peak GPU memory before loading weights: 0.200 GiB
[2026-02-26 05:24:09 TP1] Memory increase during load_weights: 9.000 GiB
[2026-02-26 05:24:10 TP0] Memory increase during load_weights: 8.000 GiB
[2026-02-26 05:24:11 DP0 TP2 EP2] Memory increase during load_weights: 1.000 GiB
"""
    found = {log.rank: (log.peak_before_bytes, log.increase_bytes) for log in parse_all(text)}
    assert found == {
        "TP0": (gib(0.1), gib(8)),
        "TP1": (gib(0.2), gib(9)),
        "DP0 TP2 EP2": (None, gib(1)),
    }
    assert parse(text).rank == "TP1"


def test_a_load_with_several_schemes_is_one_load() -> None:
    more = "Online int8_per_channel quantization: quantized 4 layers of types: ['experts', 'down_proj']\n"
    lines = DESIGN_LINES.splitlines(keepends=True)
    text = "".join([*lines[:3], more, *lines[3:]])
    (log,) = parse_all(text)
    assert (log.scheme, log.quantized_layers) == ("quark_mxfp4, int8_per_channel", 256)
    assert log.layer_types == ("down_proj", "gate_up_proj", "experts")
    assert log.peak_bytes == gib(5.79)
    assert len(parse_all(text + text)) == 2


def test_text_without_a_load_is_an_error() -> None:
    with pytest.raises(QuantloadError, match="no load in this log"):
        parse("INFO: hello\nMemory increase: 5 GiB\n")
    assert parse_all("Load weight begin.") == ()


bytes_of_memory = st.integers(0, 1 << 44)


@given(
    kind=st.sampled_from(["GPU", "CPU"]),
    before=bytes_of_memory,
    increase=st.integers(-(1 << 40), 1 << 44),
    peak=bytes_of_memory,
    final=bytes_of_memory,
    staging=bytes_of_memory,
    scheme=st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True),
    layers=st.integers(0, 10**6),
    types=st.sets(st.from_regex(r"[A-Za-z_0-9.]{1,12}", fullmatch=True), max_size=6),
    size=bytes_of_memory,
    seconds=st.floats(0.1, 1e5),
)
def test_every_line_survives_the_way_there_and_back(
    kind: str,
    before: int,
    increase: int,
    peak: int,
    final: int,
    staging: int,
    scheme: str,
    layers: int,
    types: set[str],
    size: int,
    seconds: float,
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("quantload")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logs.log_before(kind, before)
        logs.log_increase(increase)
        logs.log_quantized(scheme, layers, types)
        logs.log_peak(kind, peak, final, staging)
        logs.log_loaded(size, seconds)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (log,) = parse_all("\n".join(lines))
    assert (log.kind, log.scheme, log.quantized_layers) == (kind, scheme, layers)
    assert log.layer_types == tuple(sorted(types))
    for read, written in (
        (log.peak_before_bytes, before),
        (log.increase_bytes, increase),
        (log.peak_bytes, peak),
        (log.final_bytes, final),
        (log.staging_bytes, staging),
    ):
        assert read is not None
        assert abs(read - written) <= HALF_DIGIT
    assert log.loaded_bytes is not None
    assert abs(log.loaded_bytes - size) <= 10 * HALF_DIGIT
    assert log.seconds == pytest.approx(seconds, abs=0.051)
    assert log.bytes_per_second == pytest.approx(size / seconds, abs=10 * HALF_DIGIT)


@given(st.text() | st.lists(st.sampled_from(DESIGN_LINES.split() + SGLANG_LINES.split())).map(" ".join))
def test_any_text_is_read_without_an_accident(text: str) -> None:
    for log in parse_all(text):
        assert isinstance(log, MemoryLog)


def test_a_large_log_is_read_in_linear_time() -> None:
    """A megabyte of unfinished lists and of lines without end takes moments, not minutes."""
    text = (
        "Online x quantization: quantized 1 layers of types: ['a'\n" * 5000 + "Load weight end. elapsed=1.00 s, " * 5000
    )
    assert len(parse_all(text)) > 5000


def test_layer_types_are_the_last_words_of_names() -> None:
    names = [
        "model.layers.0.mlp.down_proj",
        "model.layers.11.mlp.experts.3.up_proj",
        "model.layers.1.mlp.down_proj",
        "h.0",
    ]
    assert layer_types(names) == ["down_proj", "h", "up_proj"]


def test_a_load_that_took_no_time_has_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quantload"):
        logs.log_loaded(0, 0.0)
        logs.log_increase(-1)
    assert caplog.messages == [
        "Loaded 0.00 GiB in 0.0 s (0.00 GiB/s)",
        "Memory increase during load_weights: 0.000 GiB",
    ]
