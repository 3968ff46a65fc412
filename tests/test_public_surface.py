"""The names users may rely on, and what they take."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import quantload
from quantload import errors

DEMO_MODEL = Path(quantload.__file__).parent / "demo_model"


def test_what_the_package_offers() -> None:
    assert sorted(quantload.__all__) == [
        "LoadOptions", "LoadReport", "QuantizationPolicy", "QuantizedModel", "QuantloadConfig", "QuantloadError",
        "convert_checkpoint", "load_quantized", "plan_quantized", "reload_weights",
    ]  # fmt: skip
    assert dir(quantload) == sorted(quantload.__all__)
    for name in quantload.__all__:
        assert getattr(quantload, name).__name__ == {"QuantizedModel": "PreTrainedModel"}.get(name, name)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'quantload' has no attribute 'load_quantised'"):
        _ = quantload.load_quantised


def signature(function: object) -> list[tuple[str, bool, object]]:
    """(name, keyword only, default) of every parameter."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in parameters]


COMMON = [
    ("model_id", False, inspect.Parameter.empty),
    ("quantization", False, "auto"),
    ("fit", True, None),
    ("device", True, "auto"),
    ("policy", True, None),
    ("options", True, None),
    ("revision", True, None),
    ("trust_remote_code", True, False),
]


def test_what_a_load_returns_has_a_type_that_knows_its_report() -> None:
    model = quantload.load_quantized(DEMO_MODEL, "int8", progress=False)
    peak: int = model.load_report.peak_bytes  # mypy checks these lines, as it does those of the README
    predicted: int = model.load_plan.peak_bytes
    assert 0 < peak <= predicted


def test_load_quantized() -> None:
    assert signature(quantload.load_quantized) == [
        *COMMON,
        ("progress", True, None),
        ("weights", True, "checkpoint"),
        ("tp", True, None),
        ("device_mesh", True, None),
        ("expert_parallel", True, False),
    ]


def test_plan_quantized() -> None:
    assert signature(quantload.plan_quantized) == COMMON


def test_reload_weights() -> None:
    assert signature(quantload.reload_weights) == [
        ("model", False, inspect.Parameter.empty),
        ("source", False, inspect.Parameter.empty),
        ("partial", True, False),
        ("adapter", True, None),
        ("revision", True, None),
        ("progress", True, None),
    ]


def test_convert_checkpoint() -> None:
    assert signature(quantload.convert_checkpoint) == [
        ("model_id", False, inspect.Parameter.empty),
        ("out", False, inspect.Parameter.empty),
        ("quantization", False, "auto"),
        ("fit", True, None),
        ("format", True, "quark"),
        ("policy", True, None),
        ("options", True, None),
        ("max_shard_bytes", True, 4 * 10**9),
        ("revision", True, None),
        ("trust_remote_code", True, False),
        ("progress", True, None),
        ("model_card", True, True),
    ]


def fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def test_the_fields_of_a_report() -> None:
    assert fields(quantload.LoadReport) == [
        "model", "quantization", "device", "seconds", "bytes_read", "checkpoint_bytes", "final_bytes", "peak_bytes",
        "staging_peak_bytes", "baseline_bytes", "predicted_final_bytes", "predicted_peak_bytes",
        "fallback_conversions", "layers", "kept", "timeline", "cache", "unexpected", "unexpected_bytes",
        "ignored_tensors", "initialized", "overlaid", "untied", "non_finite", "digest",
        "digest_seconds", "output", "output_bytes", "read_by", "documents",
        "rank", "world_size", "state", "rank_bytes_read", "rank_final_bytes", "rank_peak_bytes",
        "replicated_bytes", "bytes_between",
        "source_requests", "source_retries", "source_bytes", "source_connections",
            "limit_bytes", "available_bytes", "phases", "command", "commit", "versions", "fit",
    ]  # fmt: skip


def test_the_fields_of_its_parts() -> None:
    from quantload.memory.report import FitReport, FitRow, KeptReport, LayerReport, NonFiniteReport, TimelinePoint

    assert fields(LayerReport) == [
        "name", "kind", "scheme", "kernel", "bytes_in", "bytes_out", "numel", "sqnr_db", "max_abs_error", "amax",
        "saturated_fraction", "zero_fraction", "format", "divergence", "rows",
    ]  # fmt: skip
    assert fields(NonFiniteReport) == ["name", "nan", "infinite", "overflowed", "first"]
    assert fields(KeptReport) == ["name", "reason", "bytes"]
    assert fields(FitReport) == [
        "size", "of", "final_bytes", "planned_bytes", "expected_loss", "available_bytes", "reserve_bytes",
        "cache_bytes", "context", "requests", "rows", "policy", "sensitivity",
    ]  # fmt: skip
    assert fields(FitRow) == ["kind", "third", "scheme", "modules", "bytes", "share_of_loss"]
    assert fields(TimelinePoint) == ["seconds", "bytes_read", "memory"]


def test_policy_fields() -> None:
    assert fields(quantload.QuantizationPolicy) == [
        "linear",
        "experts",
        "ignore",
        "overrides",
        "default_ignore",
        "scale_mode",
    ]


TREE = {
    "CheckpointError": ["TruncatedShardError", "ChangedFileError", "CorruptHeaderError", "MissingShardError",
                        "UnsafePathError", "NonFiniteWeightError"],
    "RouteError": ["MissingWeightsError", "UnexpectedWeightsError", "ShapeMismatchError"],
    "PolicyError": ["UnknownSchemeError", "UnmatchedPatternError", "UnappliedOptionError"],
    "QuantloadError": ["CheckpointError", "RouteError", "PolicyError", "MemoryBudgetError", "NoKernelError",
                       "UnsupportedCheckpointError", "OutputError", "RankError"],
}  # fmt: skip


@pytest.mark.parametrize(("parent", "child"), [(p, c) for p, children in TREE.items() for c in children])
def test_the_error_tree(parent: str, child: str) -> None:
    assert getattr(errors, child).__bases__ == (getattr(errors, parent),)


def test_the_drawing_of_the_tree_is_complete() -> None:
    drawn = errors.__doc__ or ""
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for cls in classes:
        (line,) = [line for line in drawn.splitlines() if cls.__name__ in line.split()]
        assert line.index(cls.__name__) == 4 * (len(cls.__mro__) - len(errors.QuantloadError.__mro__)), cls


@pytest.mark.parametrize(
    "module", ["quantload", "quantload.errors", "quantload.options", "quantload.memory.logs",
               "quantload.memory.pytest_plugin", "quantload.memory.report"],
)  # fmt: skip
def test_a_light_import_does_not_bring_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numba', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
