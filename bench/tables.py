"""Every table of the documents: of the newest full-size results, of the support matrix, of golden bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bigger_than_memory
import cache
import faults
import gpu_tables
import kernels_cpu
import load_tables
import matmul_cpu
import model_sizes
import parity
import pipeline_results
import profile_load
import quality_tables
import remote
import serve_load
import stored
from goals import Goal
from markdown import fill, goal_table, source_line
from quantload.schemes.support_tables import markdown as support_markdown
from quantload.schemes.support_tables import online, overview, support_tables
from result_files import RESULTS, results_of

BENCH = Path(__file__).resolve().parent
DOCS = BENCH.parent / "docs"
DOCUMENTS = (
    *(BENCH.parent / "README.md", BENCH / "README.md", BENCH / "NOTES.md"),
    *(DOCS / "parity.md", DOCS / "platforms.md", DOCS / "quantized-checkpoints.md", DOCS / "reliability.md"),
    *(DOCS / "schemes.md", DOCS / "your-model.md"),
)
MISSING = "No full-size result yet."
Result = dict[str, Any]


def _newest(results: list[Result], part: str | None = None) -> Result | None:
    return next((result for result in results if part is None or part in result), None)


def _section(result: Result | None, render: Callable[[Result], str], goals: Callable[[Result], list[Goal]]) -> str:
    if result is None:
        return MISSING
    parts = [render(result), source_line(result)]
    found = goals(result)
    return "\n\n".join([*parts, goal_table(found)] if found else parts)


def _no_goals(result: Result) -> list[Goal]:
    return []


def _pipeline(results: list[Result], *parts: str, render: Callable[[Result], str]) -> str:
    """A table of the parts of the pipeline benchmark, each from the newest result that has it."""
    sections: dict[str, list[str]] = {}
    for part in parts:
        result = _newest(results, part)
        if result is not None:
            sections.setdefault(result["file"], []).append(part)
    by_file = {result["file"]: result for result in results}
    found = []
    for file, names in sections.items():
        result = {key: value for key, value in by_file[file].items() if key not in pipeline_results.PARTS}
        found.append(_section(result | {p: by_file[file][p] for p in names}, render, pipeline_results.goals_of))
    return "\n\n".join(found) or MISSING


def render_all(folder: Path = RESULTS) -> dict[str, str]:
    """Markdown of every table that is made of results, by its name."""
    loads, pipelines = results_of("load", folder), results_of("pipeline", folder)
    on_gpus, qualities = results_of("kernels", folder), results_of("quality", folder)
    return {
        "kernels_cpu": _section(
            _newest(results_of("kernels_cpu", folder)),
            lambda result: kernels_cpu.render(result, "torch.bfloat16"),
            kernels_cpu.goals_of,
        ),
        "matmul": _section(_newest(results_of("matmul_cpu", folder)), matmul_cpu.render, matmul_cpu.goals_of),
        "gpu": gpu_tables.section(on_gpus),
        "gpu_goals": gpu_tables.summary(on_gpus),
        "pipeline": _pipeline(pipelines, "warm", "cold", render=pipeline_results.render_pipeline),
        "load_summary": load_tables.summary(loads) or MISSING,
        "load_warm": load_tables.warm(loads) or MISSING,
        "load_cold": load_tables.cold(loads) or MISSING,
        "many": _pipeline(pipelines, "many", "index", render=pipeline_results.render_counts),
        "bigger_than_memory": _section(
            _newest(results_of("bigger_than_memory", folder)), bigger_than_memory.render, bigger_than_memory.goals_of
        ),
        "cache": _section(_newest(results_of("cache", folder)), cache.render, cache.goals_of),
        "remote": _section(_newest(results_of("remote", folder)), remote.render, remote.goals_of),
        "faults": _section(_newest(results_of("faults", folder)), faults.render, _no_goals),
        "serve_load": _section(_newest(results_of("serve_load", folder)), serve_load.render, _no_goals),
        "stored": _section(_newest(results_of("stored", folder)), stored.render_all, stored.goals_of),
        "peers": load_tables.peers(loads) or MISSING,
        "quality": _section(_newest(qualities, "variants"), quality_tables.render_variants, _no_goals),
        "quality_choice": _section(_newest(qualities, "variants"), quality_tables.render_choice, _no_goals),
        "quality_best": _section(_newest(qualities, "variants"), quality_tables.render_best, _no_goals),
        "quality_sqnr": _section(_newest(qualities, "variants"), quality_tables.render_sqnr, _no_goals),
        "profile": _section(_newest(results_of("profile_load", folder)), profile_load.render, _no_goals),
    }


def render_support() -> dict[str, str]:
    """Markdown of what `quantload schemes` prints, and of the sizes that follow from it."""
    tables = support_tables()
    schemes, _, kernels = tables
    found = {
        "support_online": online(),
        "support": overview(tables),
        "support_schemes": schemes,
        "support_kernels": kernels,
    }
    return {**{name: support_markdown(table) for name, table in found.items()}, "model_sizes": model_sizes.render()}


def rendered(document: Path, folder: Path = RESULTS) -> str:
    """What a document reads when its tables are made from the results in `folder`."""
    return fill(document.read_text(), {**render_all(folder), **render_support(), **parity.render()})


def write(documents: tuple[Path, ...] = DOCUMENTS, folder: Path = RESULTS) -> list[Path]:
    """Put the newest tables into the documents; returns those that changed."""
    changed = []
    for document in documents:
        text = rendered(document, folder)
        if text != document.read_text():
            document.write_text(text)
            changed.append(document)
    return changed
