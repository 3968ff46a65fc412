"""The tables and goals of `bench/pipeline.py`, from its results."""

from __future__ import annotations

from typing import Any

from goals import Goal, at_least, at_most
from markdown import markdown

PARTS = ("warm", "many", "index", "cold")
GB = 1e9
RATE_GOAL, NEARNESS_GOAL, RELOAD_GOAL, MANY_GOAL, COLD_GOAL, INDEX_GOAL = 12.0, 0.8, 0.9, 1.5, 1.1, 3.0
INDEX_STEPS = ("read_index", "map_checkpoint", "build_routes")


def ideal(rates: dict[str, float]) -> float:
    """Bytes a second of reading and then quantizing every byte on the same cores, nothing else."""
    return 1 / (1 / rates["read"] + 1 / rates["quantize"])


def slower(rates: dict[str, float]) -> float:
    """The slower of reading alone and quantizing alone, bytes a second."""
    return min(rates["read"], rates["quantize"])


def raw(seconds: dict[str, float]) -> float:
    """The faster way of reading and doing nothing, seconds."""
    return min(seconds["read"], seconds["read, drop"])


def render_pipeline(result: dict[str, Any]) -> str:
    """Warm: rates of the parts and of the whole, and how near the whole comes; cold: seconds beside reading alone."""
    warm = []
    for row in result.get("warm", []):
        rates = row["rates"]
        cells = [f"{rates[key] / GB:.1f}" for key in ("read", "quantize")] + [f"{ideal(rates) / GB:.1f}"]
        cells += [f"{rates[key] / GB:.1f}" for key in ("stream", "total")]
        cells += [f"{rates['total'] / slower(rates):.2f}", f"{rates['total'] / ideal(rates):.2f}"]
        if "reload" in rates:  # results from before there were reloads have none
            cells += [f"{rates['reload'] / GB:.1f}", f"{rates['reload'] / ideal(rates):.2f}"]
        warm.append([f"{row['checkpoint']}, {row['bytes'] / GB:.1f} GB", *cells])
    header = ("warm, GB/s of BF16", "reading", "quantizing", "one after the other", "stream", "whole load")
    nearness = "whole / slower part", "whole / one after the other", "reload", "reload / one after the other"
    tables = [markdown(warm, (*header, *nearness)[: len(warm[0])])] if warm else []
    cold = [
        [
            f"{row['checkpoint']}, {row['bytes'] / GB:.1f} GB",
            f"{row['seconds']['read']:.2f}",
            f"{row['seconds']['read, drop']:.2f}",
            f"{row['seconds']['load']:.2f}",
            f"{row['seconds']['load'] / raw(row['seconds']):.2f}x",
        ]
        for row in result.get("cold", [])
    ]
    if cold:
        tables.append(
            markdown(cold, ("cold, s", "reading, doing nothing", "the same, dropping behind", "whole load", "ratio"))
        )
    return "\n\n".join(tables)


def render_many(result: dict[str, Any]) -> str:
    """Many small tensors beside few large ones."""
    lines = [
        [
            row["checkpoint"],
            f"{row['tensors']:,}",
            f"{row['bytes'] / GB:.2f}",
            f"{row['seconds']['total']:.3f}",
            f"{row['seconds']['stream']:.3f}",
            f"{row['bytes'] / row['seconds']['total'] / GB:.2f}",
        ]
        for row in result.get("many", [])
    ]
    return markdown(lines, ("checkpoint", "tensors", "GB", "load s", "of it stream s", "GB/s")) if lines else ""


def render_index(result: dict[str, Any]) -> str:
    """Planning many tensors, by step."""
    if "index" not in result:
        return ""
    seconds = result["index"]["seconds"]
    steps = [name for name in seconds if name not in ("total", "tensors")]
    rest = seconds["total"] - sum(seconds[name] for name in steps)
    lines = [[f"`{name}`", f"{seconds[name]:.2f}"] for name in steps]
    lines += [["the rest (building the skeleton)", f"{rest:.2f}"], ["everything before the first weight", ""]]
    lines[-1][1] = f"{seconds['total']:.2f}"
    return markdown(lines, (f"{seconds['tensors']:,.0f} tensors", "s"))


def render_counts(result: dict[str, Any]) -> str:
    """Both tables about the number of tensors."""
    return "\n\n".join(filter(None, (render_many(result), render_index(result))))


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """Every goal that this result speaks of."""
    goals = []
    for row in result.get("warm", []):
        rates, name = row["rates"], row["checkpoint"]
        goals.append(at_least(f"warm: >= {RATE_GOAL:g} GB/s", name, rates["total"] / GB, RATE_GOAL, " GB/s"))
        nearness = rates["total"] / slower(rates)
        goals.append(at_least(f"warm: >= {NEARNESS_GOAL}x of the slower part", name, nearness, NEARNESS_GOAL, "x"))
        if "reload" in rates:
            near = rates["reload"] / ideal(rates)
            said = f"reload: >= {RELOAD_GOAL}x of reading and quantizing one after the other"
            goals.append(at_least(said, name, near, RELOAD_GOAL, "x"))
    for row in result.get("cold", []):
        ratio = row["seconds"]["load"] / raw(row["seconds"])
        name = f"cold: within {COLD_GOAL}x of reading and doing nothing"
        goals.append(at_most(name, row["checkpoint"], ratio, COLD_GOAL, "x"))
    if "many" in result:
        few, many = ({r["checkpoint"]: r for r in result["many"]}[name] for name in ("few", "many"))
        ratio = many["seconds"]["total"] / many["bytes"] * few["bytes"] / few["seconds"]["total"]
        name = f"{many['tensors']:,} tensors within {MANY_GOAL}x of the same bytes in {few['tensors']}"
        goals.append(at_most(name, "many", ratio, MANY_GOAL, "x"))
    if "index" in result:
        seconds = result["index"]["seconds"]
        name = f"index and routing of {seconds['tensors']:,.0f} tensors: < {INDEX_GOAL:g} s"
        goals.append(at_most(name, "headers", sum(seconds[step] for step in INDEX_STEPS), INDEX_GOAL, " s"))
    return goals
