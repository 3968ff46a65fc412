"""parse_bytes, format_bytes, plan_memory and check_budget."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.errors import MemoryBudgetError, PolicyError
from quantload.memory.amounts import GIB, MIB, format_bytes, parse_bytes
from quantload.memory.budget import check_budget
from quantload.memory.planner import SLACK_BYTES, MemoryPlan, ParameterSize, SchemeTotal, plan_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0B", 0),
        (123, 123),
        ("123B", 123),
        ("500MB", 500_000_000),
        ("2kb", 2000),
        ("16GiB", 16 << 30),
        ("17 GiB", 17 << 30),
        (" 1.5 gib ", 3 << 29),
        ("64M", 64 << 20),
        ("8g", 8 << 30),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
        ("0.1KiB", 102),
    ],
)
def test_amounts_people_write(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        " ",
        "16",
        "0",
        "GiB",
        "-1",
        "-1GiB",
        "1e9",
        "1,5GiB",
        "16 Gibi",
        "16GiBs",
        "1 6GiB",
        "nan",
        "inf",
        "1.5",
        "0x10",
        "\uff11GiB",
    ],
)
def test_nonsense_is_refused_and_quoted(nonsense: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(repr(nonsense))):
        parse_bytes(nonsense)


def test_text_without_a_unit_is_asked_for_one() -> None:
    with pytest.raises(PolicyError, match="'16' has no unit; write 16GiB, 16MB or, for bytes, 16B"):
        parse_bytes("16")


@pytest.mark.parametrize("value", [-1, True, 1.5, None, b"1GiB", ["1GiB"]])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(PolicyError):
        parse_bytes(value)  # type: ignore[arg-type]


@given(st.integers(0, 1 << 60))
def test_a_formatted_amount_reads_back_to_its_digits(size: int) -> None:
    text = format_bytes(size)
    unit = parse_bytes("1" + text.split()[1])
    assert abs(parse_bytes(text) - size) <= 0.0005 * unit + 1


def test_negative_amounts_are_formatted_too() -> None:
    assert format_bytes(-3 << 29) == "-1.500 GiB"


def small_plan(staging: int = 32 * MIB, scheme: str = "fp8_per_channel") -> MemoryPlan:
    return plan_memory(
        [
            ParameterSize("up.weight", "linear", scheme, 2 * GIB, GIB + MIB),
            ParameterSize("experts.gate_up_proj", "experts", scheme, 6 * GIB, 3 * GIB),
            ParameterSize("lm_head.weight", "linear", "none", GIB, GIB),
            ParameterSize("embed.weight", "embedding", "none", GIB, GIB),
            ParameterSize("norm.weight", "norm", "none", 4096, 4096),
        ],
        buffers_bytes=512,
        staging_bytes=staging,
    )


def test_plan_adds_up() -> None:
    plan = small_plan()
    assert plan.checkpoint_bytes == 10 * GIB + 4096
    assert plan.final_bytes == 6 * GIB + MIB + 4096 + 512
    assert plan.peak_bytes == plan.final_bytes + 32 * MIB + SLACK_BYTES
    assert SLACK_BYTES == 64 * MIB
    assert (plan.parameters_quantized, plan.parameters_kept) == (2, 3)
    assert plan.by_scheme == {
        "fp8_per_channel": SchemeTotal(2, 8 * GIB, 4 * GIB + MIB),
        "none": SchemeTotal(3, 2 * GIB + 4096, 2 * GIB + 4096),
    }
    assert plan.quantizable_kept_bytes == GIB
    hash(plan)
    assert json.loads(json.dumps(plan.to_dict()))["by_scheme"]["none"]["parameters"] == 3


def test_a_fallback_conversion_counts_in_the_peak_only() -> None:
    sizes = [ParameterSize("a", "linear", "none", 10, 10)]
    without = plan_memory(sizes, 0, 5)
    plan = plan_memory(sizes, 0, 5, transient_bytes=100, checkpoint_bytes=20)
    assert (plan.final_bytes, plan.checkpoint_bytes) == (without.final_bytes, 20)
    assert plan.peak_bytes == without.peak_bytes + 100


def test_sizes_that_would_spoil_the_prediction_are_refused() -> None:
    twice = [ParameterSize("a", "linear", "none", 10, 10)] * 2
    with pytest.raises(ValueError, match="parameter a is in the plan twice"):
        plan_memory(twice, 0, 0)
    with pytest.raises(ValueError, match="parameter a has a negative size"):
        plan_memory([ParameterSize("a", "linear", "none", 10, -1)], 0, 0)
    with pytest.raises(ValueError, match="staging_bytes is -1"):
        plan_memory([], 0, -1)


def test_a_budget_that_fits_passes() -> None:
    plan = small_plan()
    check_budget(plan, None)
    check_budget(plan, plan.peak_bytes)


def test_a_budget_one_byte_short_names_need_and_limit() -> None:
    plan = small_plan()
    with pytest.raises(MemoryBudgetError) as caught:
        check_budget(plan, plan.peak_bytes - 1)
    message = str(caught.value)
    assert f"{plan.peak_bytes} bytes" in message
    assert f"{plan.peak_bytes - 1} bytes" in message
    assert "1 B short" in message


def test_every_suggested_change_helps() -> None:
    """Following the staging and the limit advice makes the same check pass."""
    plan = small_plan(staging=200 * MIB)
    limit = plan.peak_bytes - 100 * MIB
    with pytest.raises(MemoryBudgetError) as caught:
        check_budget(plan, limit)
    message = str(caught.value)
    staging = re.search(r"--staging (\S+)", message)
    raised = re.search(r"--max-memory (\S+)", message)
    assert staging is not None
    assert raised is not None
    check_budget(small_plan(staging=parse_bytes(staging[1])), limit)
    check_budget(plan, parse_bytes(raised[1]))
    # 4 GiB + 1 MiB of FP8 would be 8 GiB * 17 / 64 = 2.125 GiB; the head of 1 GiB would be 0.266 GiB.
    assert "quark_mxfp4 would take about 1.876 GiB less" in message
    assert "remove ignore patterns: 1.000 GiB of linear and experts weights" in message
    assert "up to 752.000 MiB less" in message


def test_changes_that_would_not_help_are_not_suggested() -> None:
    plan = plan_memory([ParameterSize("a", "linear", "quark_mxfp4", 64 * MIB, 17 * MIB)], 0, 2 * MIB)
    with pytest.raises(MemoryBudgetError) as caught:
        check_budget(plan, 10 * MIB)
    message = str(caught.value)
    assert "--staging" not in message
    assert "narrower" not in message
    assert "ignore" not in message
    assert "--max-memory 83MiB" in message


def test_an_unquantized_plan_is_told_to_quantize() -> None:
    plan = plan_memory([ParameterSize("a", "linear", "none", GIB, GIB)], 0, 2 * MIB)
    with pytest.raises(MemoryBudgetError, match=r"quantize: 1\.000 GiB .* up to 752\.000 MiB less"):
        check_budget(plan, GIB)
