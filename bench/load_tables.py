"""Tables of `bench/load.py`: warm, cold, and against the peers; each from the newest run that has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from goals import Goal
from load_results import GB, Goals, Row
from loaders import LOADERS
from markdown import goal_table, markdown, source_line

Result = dict[str, Any]
Wanted = Callable[[list[Row]], bool]
CHECKPOINTS = ("dense", "moe", "huge", "tiny")
HEADER = ("loader", "seconds", "GB/s", "cpu s", "final GB", "peak anon GB", "file pages GB", "linear", "experts")
SUMMARY = ("loader", "bits", "dense: s", "final GB", "peak GB", "MoE: s", "final GB", "peak GB", "experts quantized")


def rows_of(result: Result, checkpoint: str, cold: bool) -> list[Row]:
    """The rows of a result on one checkpoint in one state of the page cache."""
    names = {field.name for field in fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in result["rows"]]
    return [row for row in rows if row.checkpoint == checkpoint and row.cold == cold]


def _measured(*loaders: str) -> Wanted:
    return lambda rows: {row.loader for row in rows if row.seconds is not None} >= set(loaders)


def _has_peer(rows: list[Row]) -> bool:
    return any(LOADERS[row.loader].family == "peer" and row.loader != "transformers-bf16" for row in rows)


def warm(results: Sequence[Result]) -> str:
    """Quantload's loads from a warm page cache, and reading and doing nothing."""
    return _tables(results, False, _measured("quark_mxfp4"), lambda row: LOADERS[row.loader].family != "peer", _own)


def cold(results: Sequence[Result]) -> str:
    """Quantload's loads from a cold page cache, and reading and doing nothing."""
    return _tables(results, True, _measured("quark_mxfp4", "read-only"), lambda row: True, _own)


def peers(results: Sequence[Result]) -> str:
    """Quantload beside transformers' on-the-fly quantizers, from runs that had both."""
    return _tables(results, False, _has_peer, lambda row: row.loader != "read-only", _against_peers)


def summary(results: Sequence[Result]) -> str:
    """One table of quantload and the peers that were measured on both the dense and the MoE checkpoint, fewest bits
    first, then fastest; `experts quantized` as for a peer that is told where the experts are, if it can be."""
    found = [
        next((each for each in results if _has_peer(rows_of(each, name, False))), None) for name in ("dense", "moe")
    ]
    dense, moe = found
    if dense is None or moe is None:
        return ""
    by_name = {row.loader: row for row in rows_of(dense, "dense", False) if row.seconds is not None}
    of_experts = {
        row.loader.removesuffix("-experts"): row for row in rows_of(moe, "moe", False) if row.seconds is not None
    }
    names = [name for name in by_name if name in of_experts and LOADERS[name].family != "floor"]
    names.sort(key=lambda name: (LOADERS[name].bits, by_name[name].seconds))
    table = markdown([_summary_cells(name, by_name[name], of_experts[name]) for name in names], SUMMARY)
    return f"{table}\n\nDense: {source_line(dense)}; MoE: `{moe['file']}`"


def _summary_cells(name: str, *rows: Row) -> list[str]:
    own = LOADERS[name].family == "quantload"
    cells = [f"**quantload `{name}`**" if own else name, str(LOADERS[name].bits)]
    for row in rows:
        sizes = ("-" if size is None else f"{size / GB:.2f}" for size in (row.final_bytes, row.peak_anon))
        cells += [f"{row.seconds:.2f}", *sizes]
    share = rows[-1].expert_share
    return [*cells, "-" if share is None else f"{share:.0%}"]


def _tables(
    results: Sequence[Result],
    cold: bool,
    wanted: Wanted,
    shown: Callable[[Row], bool],
    goals_of: Callable[[list[Row]], list[Goal]],
) -> str:
    parts: list[str] = []
    goals: list[Goal] = []
    for checkpoint in CHECKPOINTS:
        result = next((found for found in results if wanted(rows_of(found, checkpoint, cold))), None)
        if result is None:
            continue
        rows = rows_of(result, checkpoint, cold)
        size = f"**{checkpoint}**, {rows[0].checkpoint_bytes / GB:.2f} GB of BF16"
        table = markdown([_cells(row) for row in rows if shown(row)], HEADER)
        parts.append(f"{size}\n\n{table}\n\n{source_line(result)}")
        goals += goals_of(rows)
    return "\n\n".join([*parts, goal_table(goals)]) if parts else ""


def _cells(row: Row) -> list[str]:
    if row.seconds is None:
        return [row.loader, row.detail or row.status, *["-"] * (len(HEADER) - 2)]
    sizes = [row.final_bytes, row.peak_anon, row.checkpoint_pages_after]
    shares = [row.linear_share, row.expert_share]
    return [
        row.loader,
        f"{row.seconds:.3f}",
        f"{(row.rate or 0) / GB:.2f}",
        "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.2f}",
        *("-" if size is None else f"{size / GB:.2f}" for size in sizes),
        *("-" if share is None else f"{share:.0%}" for share in shares),
    ]


def _own(rows: list[Row]) -> list[Goal]:
    """The goals that need no peer; those every scheme has are put together."""
    goals = [goal for goal in Goals(rows).all() if "peer" not in goal.name and "torchao" not in goal.name]
    found: list[Goal] = []
    together: dict[str, list[Goal]] = {}
    for goal in goals:
        rest = goal.name.partition(": ")[2]
        if rest.startswith(("peak", "plan")):
            together.setdefault(rest, []).append(goal)
        else:
            found.append(goal)
    for name, each in together.items():
        met = sum(goal.met is True for goal in each)
        missed = [f"{goal.name.partition(': ')[0]} {goal.reached}" for goal in each if goal.met is not True]
        reached = "; ".join([f"{met} of {len(each)} schemes", *missed])
        found.append(Goal(name, each[0].checkpoint, met == len(each), reached))
    return found


def _against_peers(rows: list[Row]) -> list[Goal]:
    return [goal for goal in Goals(rows).all() if "peer" in goal.name or "torchao" in goal.name]
