from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.errors import PolicyError, QuantloadError
from quantload.memory.report import KeptReport, LayerReport, LoadReport, TimelinePoint
from quantload.memory.summary import render
from rich.console import Console

# Section 7 of the design, in its order, and what a load leaves out.
REPORT_FIELDS = [
    "model",
    "quantization",
    "device",
    "seconds",
    "bytes_read",
    "checkpoint_bytes",
    "final_bytes",
    "peak_bytes",
    "staging_peak_bytes",
    "baseline_bytes",
    "predicted_final_bytes",
    "predicted_peak_bytes",
    "fallback_conversions",
    "layers",
    "kept",
    "timeline",
    "cache",
    "unexpected",
    "unexpected_bytes",
    "ignored_tensors",
    "initialized",
    "overlaid",
    "untied",
    "non_finite",
    "digest",
    "digest_seconds",
    "output",
    "output_bytes",
    "read_by",
    "documents",
    "rank",
    "world_size",
    "state",
    "rank_bytes_read",
    "rank_final_bytes",
    "rank_peak_bytes",
    "replicated_bytes",
    "bytes_between",
    "source_requests",
    "source_retries",
    "source_bytes",
    "source_connections",
    "limit_bytes",
    "available_bytes",
    "phases",
    "command",
    "commit",
    "versions",
    "fit",
]
LAYER_FIELDS = [
    "name",
    "kind",
    "scheme",
    "kernel",
    "bytes_in",
    "bytes_out",
    "numel",
    "sqnr_db",
    "max_abs_error",
    "amax",
    "saturated_fraction",
    "zero_fraction",
    "format",
    "divergence",
    "rows",
]


def layer(name: str = "model.layers.0.mlp.down_proj", sqnr_db: float | None = 19.0, **changes: object) -> LayerReport:
    report = LayerReport(name, "linear", "quark_mxfp4", "numba", 2000, 531, 1000, sqnr_db, 0.25, 3.0, 0.001, 0.1)
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def report(layers: list[LayerReport] | None = None) -> LoadReport:
    return LoadReport(
        model="demo",
        quantization="quark_mxfp4",
        device="cpu",
        seconds=2.0,
        bytes_read=4 << 30,
        checkpoint_bytes=4 << 30,
        final_bytes=1 << 30,
        peak_bytes=1200 << 20,
        staging_peak_bytes=32 << 20,
        baseline_bytes=300 << 20,
        predicted_final_bytes=1 << 30,
        predicted_peak_bytes=1216 << 20,
        fallback_conversions=1,
        layers=[layer()] if layers is None else layers,
        kept=[KeptReport("lm_head", "output head, ignored by default", 4096)],
        timeline=[TimelinePoint(0.0, 0, 0), TimelinePoint(2.0, 4 << 30, 1 << 30)],
    )


def test_fields_are_those_of_the_design() -> None:
    plain = report().to_dict()
    assert list(plain) == REPORT_FIELDS
    assert list(plain["layers"][0]) == LAYER_FIELDS
    assert list(plain["kept"][0]) == ["name", "reason", "bytes"]
    assert list(plain["timeline"][0]) == ["seconds", "bytes_read", "memory"]


def test_statistics_become_a_line() -> None:
    statistics = torch.tensor([1000, 50.0, 0.5, 0.3, 4.0, 5, 20], dtype=torch.float64)
    line = LayerReport.from_statistics(
        statistics, name="a", kind="experts", scheme="s", kernel="k", bytes_in=2000, bytes_out=531, numel=1000
    )
    assert line.sqnr_db == pytest.approx(20.0)
    assert (line.max_abs_error, line.amax) == (0.3, 4.0)
    assert (line.saturated_fraction, line.zero_fraction) == (0.005, 0.02)
    assert (line.kind, line.bytes_in, line.bytes_out, line.numel) == ("experts", 2000, 531, 1000)


@pytest.mark.parametrize(
    ("signal", "noise", "wanted"), [(4.0, 0.0, math.inf), (0.0, 0.0, math.nan), (8.0, 0.008, 30.0), (1.0, 1.0, 0.0)]
)
def test_sqnr(signal: float, noise: float, wanted: float) -> None:
    line = LayerReport.from_statistics(
        [10, signal, noise, 0, 0, 0, 0],
        name="a",
        kind="linear",
        scheme="s",
        kernel="k",
        bytes_in=0,
        bytes_out=0,
        numel=10,
    )
    assert line.sqnr_db == pytest.approx(wanted, nan_ok=True)
    in_json = dataclasses.asdict(report([line])) and report([line]).to_dict()["layers"][0]["sqnr_db"]
    assert in_json == (pytest.approx(wanted) if math.isfinite(wanted) else None)


def test_an_empty_layer_has_no_shares_and_a_wrong_vector_is_refused() -> None:
    common = {"name": "a", "kind": "linear", "scheme": "s", "kernel": "k", "bytes_in": 0, "bytes_out": 0, "numel": 0}
    empty = LayerReport.from_statistics([0.0] * 7, **common)  # type: ignore[arg-type]
    assert (empty.saturated_fraction, empty.zero_fraction) == (0.0, 0.0)
    with pytest.raises(ValueError, match="statistics of a have 6 accumulators; 7 are expected"):
        LayerReport.from_statistics([0.0] * 6, **common)  # type: ignore[arg-type]


def test_file_round_trip(tmp_path: Path) -> None:
    before = report()
    before.save(tmp_path / "report.json")
    assert LoadReport.load(tmp_path / "report.json") == before


@given(st.floats() | st.none(), st.floats() | st.none(), st.integers(-(1 << 50), 1 << 50), st.text(max_size=20))
def test_json_is_strict_and_reads_back(sqnr: float | None, amax: float | None, memory: int, name: str) -> None:
    before = report([layer(name, sqnr, amax=amax)])
    before.timeline.append(TimelinePoint(3.0, 1, memory))
    text = json.dumps(before.to_dict(), allow_nan=False)
    after = LoadReport.from_dict(json.loads(text))
    assert after.to_dict() == before.to_dict()
    assert after.layers[0].name == name
    assert after.timeline[-1].memory == memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, r"unknown fields \[speed\]"),
        ({"layers": [{"name": "a"}]}, "lacks .*bytes_in"),
        ({"layers": {"name": "a"}}, "layers of LoadReport is .*, expected list"),
        ({"kept": ["a"]}, "str where the fields of KeptReport"),
    ],
)
def test_something_else_is_not_a_report(change: dict[str, object], message: str) -> None:
    with pytest.raises(QuantloadError, match=message):
        LoadReport.from_dict(report().to_dict() | change)


def test_files_that_are_not_reports_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"model": ')
    with pytest.raises(QuantloadError, match=r"broken\.json is not a load report"):
        LoadReport.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(QuantloadError, match="list where the fields of LoadReport are expected"):
        LoadReport.load(tmp_path / "list.json")


def test_speed_and_increase() -> None:
    assert report().bytes_per_second == 2 << 30
    assert report().increase_bytes == 1 << 30
    bare = dataclasses.replace(report(), seconds=0.0, timeline=[], final_bytes=77)
    assert (bare.bytes_per_second, bare.increase_bytes) == (0.0, 77)


def rendered(what: LoadReport, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(what, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return str(text)


def test_summary_aggregates_schemes_and_shows_the_worst() -> None:
    layers = [layer(f"layers.{i}.proj", 20.0 + i) for i in range(8)] + [
        layer("layers.0.experts", 25.0, scheme="int8_per_channel", kind="experts", kernel="llvm"),
        layer("layers.1.exact", math.inf, scheme="int8_per_channel", kind="experts", kernel="llvm"),
    ]
    text = rendered(report(layers))
    mxfp4 = next(line for line in text.splitlines() if "quark_mxfp4" in line and "numba" in line)
    assert "8 linear" in mxfp4
    assert "23.5, 20.0 dB" in mxfp4  # mean of 20..27, and the lowest
    assert "8.0 k" in mxfp4
    int8 = next(line for line in text.splitlines() if "int8_per_channel" in line)
    assert "2 experts" in int8
    assert "25.0, 25.0 dB" in int8
    worst = text[text.index("worst layers") : text.index("kept as stored")]
    assert [f"layers.{i}.proj" in worst for i in range(6)] == [True] * 5 + [False]
    assert "fallback conversions: 1" in text


def test_summary_groups_what_was_kept_and_compares_with_the_plan() -> None:
    what = report()
    what.kept += [KeptReport(f"layers.{i}.gate", "router [not quantized]", 1 << 20) for i in range(5)]
    text = rendered(what, width=140)
    kept = next(line for line in text.splitlines() if "router [not quantized]" in line)
    assert "layers.2.gate, ... (5 in all)" in kept
    assert "5.000 MiB" in kept
    peak = next(line for line in text.splitlines() if line.strip().startswith("peak"))
    assert "1.172 GiB" in peak
    assert "1.188 GiB" in peak
    assert "read 4.000 GiB in 2.0 s (2.00 GiB/s)" in text


def test_summary_of_a_load_without_statistics_or_layers() -> None:
    plain = LayerReport("a.very.long.name." * 6, "linear", "fp8_per_channel", "numba", 2000, 1010, 1000)
    assert "worst" not in rendered(report([plain]), width=60)
    empty = report([])
    empty.kept.clear()
    assert "kept" not in rendered(empty)


def test_summary_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    render(report())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "quark_mxfp4" in captured.err


def test_reading_a_report_or_a_log_imports_no_torch() -> None:
    code = (
        "import sys; from quantload.memory import LoadReport, MemoryLog, assert_load_memory, parse_bytes, plan_memory;"
        "import quantload.memory.logs, quantload.memory.pytest_plugin;"
        "heavy = ('torch', 'transformers', 'numba', 'rich', 'prometheus_client', 'numpy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_exports_what_it_names() -> None:
    import quantload.memory as package

    for name in package.__all__:
        assert getattr(package, name).__module__.startswith("quantload.memory.")
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_tables_are_records_that_a_data_frame_takes() -> None:
    made = report()
    rows = made.records("layers")
    assert [row["name"] for row in rows] == [each.name for each in made.layers]
    assert list(rows[0]) == LAYER_FIELDS
    assert [list(row) for row in made.records("kept")] == [["name", "reason", "bytes"]] * len(made.kept)
    with pytest.raises(PolicyError, match="no table 'sizes'; it has layers, kept, timeline, phases"):
        made.records("sizes")  # type: ignore[arg-type]


def test_a_measured_divergence_is_noted_at_its_layer(tmp_path: Path) -> None:
    found = report([layer("a"), layer("b")])
    found.note_divergence({"b": 0.002})
    found.note_divergence({})
    assert [each.divergence for each in found.layers] == [None, 0.002]
    found.save(tmp_path / "report.json")
    assert LoadReport.load(tmp_path / "report.json") == found
    for wrong, said in (({"c": 0.1}, "no quantized layer 'c'"), ({"a": -1.0}, "nats"), ({"a": math.nan}, "nats")):
        with pytest.raises(PolicyError, match=said):
            found.note_divergence(wrong)
    assert [each.divergence for each in found.layers] == [None, 0.002]
