"""Tables and goals of `bench/kernels.py`, from one of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from goals import Goal, at_least, at_most
from gpu_facts import gpu_headline
from gpu_pieces import QUANTIZING, WAITING
from markdown import goal_table, markdown, source_line

Result = Mapping[str, Any]
Row = Mapping[str, Any]
NOT_RUN = "Not run: no GPU was available. On a machine with one: `python bench/kernels.py`."
PARTS = ("quantize", "linear", "experts", "load")
COPY_GOAL, DECODE_GOAL, DECODE_LIMIT, LOAD_GOAL = 0.85, 2.5, 3.76, 0.85
GB = 1e9


def render(result: Result, every_kernel: bool = True) -> str:
    """All tables of a result; without `every_kernel` only the kernels that are chosen when nothing is said."""
    parts = [gpu_headline(result["gpu"])]
    tables: dict[str, tuple[str, Callable[[], str]]] = {
        "quantize": ("Quantizing", lambda: quantize_table(result["quantize"])),
        "linear": ("Linear layers", lambda: product_table(result["linear"], every_kernel)),
        "experts": ("Experts", lambda: product_table(result["experts"], every_kernel)),
        "load": ("Loading", lambda: load_table(result["load"])),
    }
    for part, (title, table) in tables.items():
        if result.get(part):
            parts.append(f"**{title}**\n\n{table()}")
    if result["failures"]:
        parts.append(
            "\n".join(["**Failed or wrong**", "", *(f"- {f['what']}: {f['why']}" for f in result["failures"])])
        )
    return "\n\n".join(parts)


def quantize_table(rows: list[Row]) -> str:
    """GB/s read and written, as shares of the copy's, and microseconds of a call that waits for its result."""
    lines = []
    for row in rows:
        moved, seconds = row["moved_bytes"], row["seconds"]
        cells = [f"{_rate(moved['copy'], seconds['copy']) / GB:.0f}"]
        for side in QUANTIZING:
            known = side in seconds
            cells.append(f"{_rate(moved[side], seconds[side]) / GB:.0f}" if known else "-")
            cells.append(f"{row['share_of_copy'][side]:.2f}" if known else "-")
        cells += [f"{seconds[side]['issued'] * 1e6:.0f}" for side in WAITING]
        cells.append(str(row["differing"]))
        lines.append([f"{row['format']} {row['piece_bytes'] >> 20} MiB", *cells])
    header = ["piece of BF16", "copy GB/s", "quantize GB/s", "of copy", "+ stats GB/s", "of copy"]
    return markdown(lines, [*header, "us of a call", "+ stats", "codes that differ"])


def _rate(moved: float, times: Row) -> float:
    return moved / float(times["device"] if times["device"] is not None else times["issued"])


def product_table(rows: list[Row], every_kernel: bool) -> str:
    """A line for each format, kernel and shape: microseconds at the fewest tokens, and the ratio to BF16 by tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        for kernel in row["ratios"]:
            if every_kernel or kernel == row["default"]:
                lines.setdefault((row["format"], kernel, _shape(row)), {})[row["tokens"]] = row
    cells = []
    for (name, kernel, shape), found in lines.items():
        first = found[min(found)]
        micro = " / ".join(_micro(first["seconds"][side]) for side in (kernel, "bf16"))
        ratios = [f"{found[count]['ratios'][kernel]:.2f}x" if count in found else "-" for count in tokens]
        cells.append([f"{name} {shape}, {kernel}", micro, *ratios])
    header = ["weight, kernel", f"us at {min(tokens)}, ours / BF16", *(f"{count} tok" for count in tokens)]
    return markdown(cells, header)


def _shape(row: Row) -> str:
    return "x".join(str(row[key]) for key in ("experts", "rows", "cols") if key in row)


def _micro(times: Row) -> str:
    if times["device"] is None:
        return f"{times['issued'] * 1e6:.1f}*"
    return f"{times['device'] * 1e6:.1f}"


def load_table(load: Row) -> str:
    """Seconds and rates of whole loads, and the device's memory."""
    lines = []
    for row in load["rows"]:
        rates = [row["bytes"] / row[key] / GB for key in ("seconds", "stream", "copy_seconds")]
        over = row["peak_bytes"] - row["final_bytes"]
        sizes = [row["final_bytes"] / GB, over / 2**20, row["staging_bytes"] / 2**20]
        cells = [f"{row['seconds']:.3f}", *(f"{rate:.1f}" for rate in rates), f"{row['share_of_copy']:.2f}"]
        lines.append([row["scheme"], *cells, f"{sizes[0]:.2f}", f"{sizes[1]:.1f}", f"{sizes[2]:.1f}"])
    header = ["scheme", "seconds", "GB/s", "stream GB/s", "pinned copy GB/s", "of copy", "final GB"]
    return markdown(lines, [*header, "peak over final MiB", "staging MiB"])


def goals_of(result: Result) -> list[Goal]:
    """Quantizing at the copy's speed, MXFP4 decode against BF16, loading at the copy's speed and inside its memory."""
    goals = []
    for row in result.get("quantize") or ():
        shares = [row["share_of_copy"][side] for side in QUANTIZING if side in row["share_of_copy"]]
        subject = f"{row['format']}, {row['piece_bytes'] >> 20} MiB"
        found = min(shares, default=None) if not row["differing"] else None
        goals.append(
            at_least(f"quantize, with and without statistics: >= {COPY_GOAL} of a copy", subject, found, COPY_GOAL, "")
        )
    for row in result.get("linear") or ():
        if (row["format"], row["tokens"]) == ("mxfp4", 1):
            name = f"mxfp4, 1 token: >= {DECODE_GOAL}x BF16 (the bytes allow {DECODE_LIMIT}x)"
            goals.append(at_least(name, _shape(row), row["ratios"].get(row["default"]), DECODE_GOAL, "x"))
    load = result.get("load") or {"rows": ()}
    for row in load["rows"]:
        over = (row["peak_bytes"] - row["final_bytes"]) / 2**20
        limit = (row["staging_bytes"] + row["slack_bytes"]) / 2**20
        subject = f"{row['scheme']}, {load['checkpoint']}"
        goals.append(at_least(f"load: >= {LOAD_GOAL} of a pinned copy", subject, row["share_of_copy"], LOAD_GOAL, ""))
        goals.append(at_most("device peak <= final + staging + 64 MiB", subject, over, limit, " MiB over final"))
    return goals


def newest_parts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results, newest first, each with only those of its parts that no newer one has; none without a part."""
    seen: set[str] = set()
    found = []
    for result in results:
        parts = {part for part in PARTS if result.get(part)} - seen
        if parts:
            found.append({key: value for key, value in result.items() if key not in PARTS or key in parts})
        seen |= parts
    return found


def section(results: Sequence[Result]) -> str:
    """The tables for `bench/README.md`, each from the newest result that has it."""
    parts = []
    for result in newest_parts(results):
        parts += [render(result, every_kernel=False), source_line(result), goal_table(goals_of(result))]
    return "\n\n".join(parts) or NOT_RUN


def summary(results: Sequence[Result]) -> str:
    """The goals alone, for `docs/platforms.md`."""
    parts = []
    for result in newest_parts(results):
        parts += [gpu_headline(result["gpu"]), goal_table(goals_of(result)), source_line(result)]
    return "\n\n".join(parts) or NOT_RUN
