"""The peaks of other schemes are those of their own plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from quantload import load_quantized
from quantload.cli.preparing import DEMO_MODEL
from quantload.fit.peaks import scheme_peaks
from quantload.options import LoadOptions, QuantizationPolicy
from quantload.page.costs import costs
from quantload.planning import plan_quantized
from quantload.schemes.registry import ENTRIES

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("qwen3_moe_odd", "quark_mxfp4"), ("qwen3_moe_odd", "none"), ("llama4_text", "none"), ("gpt2", "experts_int8")],
)
def test_the_model_has_exactly_the_bytes_that_a_plan_of_its_own_gives_it(
    checkpoint: Callable[[str], Path], name: str, scheme: str
) -> None:
    path, options = checkpoint(name), LoadOptions()
    policy = QuantizationPolicy(ignore=("*.0.*",), default_ignore=False)
    found = {each.scheme: each for each in scheme_peaks(plan_quantized(path, scheme, policy=policy), options)}
    assert set(found) == {entry.name for entry in ENTRIES} - {scheme, "none"}
    for other in found:
        planned = plan_quantized(path, other, policy=policy).plan.memory
        assert found[other].final_bytes == planned.final_bytes, other
        assert found[other].peak_bytes == pytest.approx(planned.peak_bytes, abs=1 << 20), other


@pytest.mark.parametrize("folder", ["native_llama_awq", "quark_qwen3moe_mxfp4"])
def test_a_quantized_checkpoint_may_also_stay_as_it_is_stored(folder: str) -> None:
    options = LoadOptions()
    found = {each.scheme: each for each in scheme_peaks(plan_quantized(GOLDEN / folder, "mxfp8"), options)}
    for other in ("auto", "fp8_per_channel"):
        assert found[other].final_bytes == plan_quantized(GOLDEN / folder, other).plan.memory.final_bytes, other


def test_schemes_that_the_load_could_not_be_done_with_are_left_out(checkpoint: Callable[[str], Path]) -> None:
    policy = QuantizationPolicy(scale_mode="mse")
    draft = plan_quantized(checkpoint("llama"), "quark_mxfp4", policy=policy)
    assert {each.scheme for each in scheme_peaks(draft, LoadOptions())} == {
        "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "nvfp4", "int4_per_group",
    }  # fmt: skip


def test_the_page_of_a_load_has_the_same_sizes() -> None:
    draft = plan_quantized(DEMO_MODEL, "nl4")
    found = {each.scheme: each for each in scheme_peaks(draft, LoadOptions(), stored=True)}
    shown = {each.scheme: each for each in costs(load_quantized(DEMO_MODEL, "nl4").load_report.to_dict())}
    assert shown.pop("nl4").is_this
    assert set(shown) == set(found)
    for name, each in shown.items():  # but for the scale of a whole matrix
        assert each.final_bytes == pytest.approx(found[name].final_bytes, rel=1e-3), name
        assert each.peak_bytes == pytest.approx(found[name].peak_bytes, rel=1e-3), name
