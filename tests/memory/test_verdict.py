"""Whether a load fits, and what is said about it."""

from __future__ import annotations

import pytest
from quantload.errors import MemoryBudgetError
from quantload.memory.limits import MACHINE, MemoryLimit
from quantload.memory.planner import MemoryPlan, ParameterSize, plan_memory
from quantload.memory.verdict import SchemePeak, judge

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def plan() -> MemoryPlan:
    """A model of 100 MiB, an arena of 20 and the allowance of 64: a peak of 184."""
    return plan_memory([ParameterSize("a", "linear", "none", 100 * MIB, 100 * MIB)], 0, 20 * MIB)


def limit(available: int, swap: int = 0, is_virtual: bool = False, name: str = "the limit") -> MemoryLimit:
    return MemoryLimit(name, 500 * MIB, (500 - available) * MIB, is_virtual, swap * MIB)


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (limit(184), "fits"),
        (limit(183), "tight"),
        (limit(100), "tight"),
        (limit(99), "does not fit"),
        (limit(60, swap=40), "tight"),
        (limit(60, swap=39), "does not fit"),
        (limit(184, is_virtual=True), "fits"),
        (limit(120, is_virtual=True), "tight"),
        (limit(119, is_virtual=True), "does not fit"),
    ],
)
def test_a_load_does_not_fit_where_it_is_certain_to_fail_and_nowhere_else(
    plan: MemoryPlan, found: MemoryLimit, state: str
) -> None:
    verdict = judge(plan, [limit(400), found, limit(300)])
    assert (verdict.state, verdict.limit, verdict.needed) == (state, found, 184 * MIB)
    if state == "does not fit":
        with pytest.raises(MemoryBudgetError, match=r"the load does not fit: needs 184\.0 MiB.*--force"):
            verdict.check("the load", force=False)
    verdict.check("the load", force=True)


def test_of_a_load_onto_a_gpu_the_host_holds_the_arena_only(plan: MemoryPlan) -> None:
    device = limit(200, name="the memory of cuda:0")
    verdict = judge(plan, [limit(90)], device)
    assert (verdict.state, verdict.limit, verdict.needed) == ("fits", limit(90), 84 * MIB)
    assert judge(plan, [limit(10, is_virtual=True)], device).state == "does not fit"
    verdict = judge(plan, [limit(400)], limit(90, name="the memory of cuda:0"))
    assert str(verdict).startswith("does not fit: needs 184.0 MiB, 90.0 MiB available (the memory of cuda:0 allows")


def test_a_machine_whose_gpu_shares_its_memory_holds_the_model_and_both_arenas(plan: MemoryPlan) -> None:
    device = MemoryLimit("the memory of cuda:0", 500 * MIB, 100 * MIB, is_virtual=False, is_shared=True)
    enough = limit(184 + 84, name=MACHINE)
    assert judge(plan, [enough], device).state == "fits"
    verdict = judge(plan, [limit(184 + 83, name=MACHINE)], device)
    assert (verdict.state, verdict.needed) == ("tight", (184 + 84) * MIB)
    assert judge(plan, [limit(84, name="a cgroup")], device).state == "fits"  # which does not count a GPU's memory


@pytest.mark.parametrize(
    ("peak", "found", "said"),
    [
        (18 * GIB, MemoryLimit(MACHINE, 24 * GIB, 3 * GIB // 2, False), "fits: 18.0 of 22.5 GiB available"),
        (74 * MIB, MemoryLimit(MACHINE, 24 * GIB, 3 * GIB // 2, False), "fits: 74.0 MiB of 22.5 GiB available"),
        (
            18 * GIB + 1,
            MemoryLimit("the memory cgroup (/x)", 20 * GIB, GIB, False),
            "fits: 18.0 of 19.0 GiB available (the memory cgroup (/x) allows 20.000 GiB, of which 19.000 GiB are left)",
        ),
        (18 * GIB, MemoryLimit(MACHINE, 24 * GIB, 8 * GIB, False, 4 * GIB),
         "tight: needs 18.0 GiB, 16.0 GiB and 4.0 GiB of swap available"),
        (18 * GIB, MemoryLimit(MACHINE, 24 * GIB, 6 * GIB + 9 * MIB, False, 4 * GIB),
         "tight: needs 18.000 GiB, 17.991 GiB and 4.0 GiB of swap available"),
    ],
)  # fmt: skip
def test_the_verdict_is_one_line(peak: int, found: MemoryLimit, said: str) -> None:
    plan = plan_memory([ParameterSize("a", "linear", "none", peak, peak)], 0, 0, overhead_bytes=0)
    assert str(judge(plan, [found])) == said


def test_the_smallest_scheme_that_fits_is_named_or_that_none_does(plan: MemoryPlan) -> None:
    others = [SchemePeak("fp8", 90 * MIB, 174 * MIB), SchemePeak("mxfp4", 50 * MIB, 134 * MIB)]
    verdict = judge(plan, [limit(60)], others=lambda: others)
    assert str(verdict).endswith("; smallest that does: mxfp4 at 134.0 MiB")
    assert verdict.to_dict()["smallest_that_fits"] == "mxfp4"
    assert [each["scheme"] for each in verdict.to_dict()["other_schemes"]] == ["mxfp4", "fp8"]
    verdict = judge(plan, [limit(40)], others=lambda: others)
    assert str(verdict).endswith("; no scheme does: the smallest, mxfp4, needs 134.0 MiB")
    assert verdict.to_dict()["smallest_that_fits"] is None


def test_other_schemes_are_not_asked_for_where_the_load_fits(plan: MemoryPlan) -> None:
    def fail() -> list[SchemePeak]:
        raise AssertionError

    assert judge(plan, [limit(150)], others=fail).state == "tight"


def test_a_system_that_says_nothing_refuses_nothing(plan: MemoryPlan) -> None:
    verdict = judge(plan, [])
    assert (verdict.state, verdict.to_dict()["available_bytes"]) == ("fits", None)
    assert str(verdict) == "needs 184.000 MiB; what is available is not known"


def test_a_limit_of_the_callers_own_is_what_is_said_where_it_is_less_than_what_there_is(plan: MemoryPlan) -> None:
    verdict = judge(plan, [MemoryLimit(MACHINE, 24 * GIB, 3 * GIB // 2, False)])
    assert str(verdict.within(GIB)) == "fits: 184.0 MiB of 1.0 GiB that --max-memory allows; 22.5 GiB available"
    assert verdict.within(GIB).to_dict()["allowed_bytes"] == GIB
    for other in (None, 23 * GIB, 184 * MIB - 1):  # the last with --force
        assert verdict.within(other) == verdict
