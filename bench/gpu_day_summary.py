"""One table of what a day found, and what to do next, from the files of its stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_pieces import QUANTIZING
from gpu_tables import COPY_GOAL, DECODE_GOAL, LOAD_GOAL

Row = tuple[str, str, str, str]
"""Stage, what, figure, verdict: "ok", "WRONG", "below" (a goal) or "cut off"."""
WRONG, BELOW, CUT = "WRONG", "below", "cut off"


def read(out: Path, name: str) -> dict[str, Any]:
    """What a stage wrote; nothing where it did not begin."""
    path = out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def summarize(out: Path) -> tuple[str, bool]:
    """The table and the words, and whether something is wrong (a missed goal is not)."""
    day = read(out, "day")
    rows: list[Row] = []
    if "right" in day["stages"]:
        rows += right_rows(out)
    for stage, make in (("loads", load_rows), ("speed", speed_rows), ("deeper", deeper_rows)):
        if stage in day["stages"]:
            rows += [*make(read(out, stage)), *end_rows(stage, read(out, stage), day["stages"][stage])]
    table = table_of(rows)
    words = "\n".join(f"- {line}" for line in next_steps(rows))
    return f"{table}\n\nNext:\n{words}", any(row[3] == WRONG for row in rows)


def table_of(rows: list[Row]) -> str:
    """The rows under each other; what was found, which may be long, last."""
    width = max((len(row[1]) for row in rows), default=0)
    lines = [("stage", "what", "found", ""), ("-----", "-" * width, "-----", "-------"), *rows]
    return "\n".join(f"{stage:8}{verdict:9}{what:{width}}  {found}".rstrip() for stage, what, found, verdict in lines)


def right_rows(out: Path) -> Iterator[Row]:
    """A row for each operation, and one for each kernel that is wrong."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("right-*.json"))]
    found = [entry for part in parts for entry in part.get("targets", {}).values()]
    for operation in ("quantize", "dequantize", "linear", "experts"):
        of = [entry for entry in found if entry["operation"] == operation]
        inputs = sum(entry["cases"] + entry["examples"] for entry in of)
        wrong = [entry for entry in of if entry["failures"]]
        yield "right", f"{operation}: {len(of)} kernels", f"{inputs} inputs", WRONG if wrong else "ok" if of else CUT
        for entry in wrong:
            failure = entry["failures"][-1]
            given = failure.get("smallest") or failure["case"]
            label = " ".join(entry[key] for key in ("operation", "format", "kernel", "mode"))
            yield "right", label, f"{failure['why']}; smallest: {given}", WRONG
    unreached = [name for part in parts for name in part.get("not reached", ())]
    if unreached or not parts or not all(part.get("done") for part in parts):
        yield "right", f"{len(unreached)} kernels not reached", ", ".join(unreached[:5]), CUT


def end_rows(stage: str, found: dict[str, Any], ended: dict[str, Any]) -> Iterator[Row]:
    """What failed in a stage, and whether it came to its end."""
    for failure in found.get("failures", ()):
        yield stage, failure["what"], failure["why"], WRONG
    if "now" in found:
        yield stage, found["now"], "the process ended in the middle of it", WRONG
    if "error" in found:
        yield stage, "the stage", found["error"], WRONG
    unreached = found.get("not reached", ())
    if unreached or not found.get("done"):
        yield stage, f"{len(unreached)} not reached", "; ".join((*ended["said"], *unreached[:4])), CUT


def load_rows(found: dict[str, Any]) -> Iterator[Row]:
    """The demo model under each scheme, the large checkpoints."""
    for row in found.get("demo", ()):
        off = f"{row['same']} of {row['tokens']} tokens, logits off by {row['logits_off']:.2g}"
        if "margin_of_difference" in row:
            off += f", margin {row['margin_of_difference']:.2g} times that"
        figure = f"{len(row['differing'])} tensors differ, {off}"
        yield "loads", f"demo {row['scheme']}", figure, "ok" if row["right"] else WRONG
    for row in found.get("large", ()):
        over, host, allowed = (row[key] / 2**20 for key in ("over_final", "host_over", "allowed"))
        figure = f"{row['differing_count']} tensors differ; over final {over:.0f}, host {host:.0f} of {allowed:.0f} MiB"
        yield "loads", f"{row['checkpoint']} {row['scheme']}", figure, "ok" if row["right"] else WRONG


def speed_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Figures beside their goals."""
    for row in found.get("quantize", ()):
        shares = {side: row["share_of_copy"].get(side, row["share_of_copy"]["call"]) for side in QUANTIZING}
        least = min(shares.values())
        verdict = WRONG if row["differing"] else "ok" if least >= COPY_GOAL else BELOW
        figure = f"{least:.2f} of the device's copy (goal {COPY_GOAL})"
        yield "speed", f"quantize {row['format']} {row['piece_bytes'] / 2**20:g} MiB", figure, verdict
    for kind in ("linear", "experts"):
        for row in found.get(kind, ()):
            ratio, tokens = row["ratios"].get(row["default"]), row["tokens"]
            is_goal = (row["format"], tokens, kind) == ("mxfp4", 1, "linear")
            goal = f" (goal {DECODE_GOAL})" if is_goal else ""
            figure = "wrong, so not timed" if ratio is None else f"{ratio:.2f}x BF16{goal}"
            verdict = WRONG if ratio is None else BELOW if ratio < (DECODE_GOAL if is_goal else 1.0) else "ok"
            shape = "x".join(str(row[key]) for key in ("experts", "rows", "cols") if key in row)
            yield "speed", f"{kind} {row['format']} {shape} {tokens} tok, {row['default']}", figure, verdict
    for row in found.get("loads", ()):
        figure = (
            f"{row['share_of_copy']:.2f} of the pinned copy (goal {LOAD_GOAL}), {row['share_of_read']:.2f} of reading"
        )
        yield "speed", f"load {row['scheme']}", figure, "ok" if row["share_of_copy"] >= LOAD_GOAL else BELOW


def deeper_rows(found: dict[str, Any]) -> Iterator[Row]:
    """What takes longest, and better tiles."""
    for row in found.get("profiles", ()):
        yield "deeper", f"profile of a {row['what']}", f"longest: {row['longest'][0]['name']}", "ok"
    for row in found.get("tiles", ()):
        figure = f"{row['best_ratio']:.2f}x the default with {row['best']}"
        yield "deeper", f"tiles of {row['format']} {row['kernel']} {row['tokens']} tok", figure, "ok"


def next_steps(rows: list[Row]) -> list[str]:
    """In words, by worth: bytes, then products, then loads, then speed."""
    wrong = [row for row in rows if row[3] == WRONG]
    kernels = [row[1] for row in wrong if row[0] == "right" and ":" not in row[1]]
    steps = []
    if kernels:
        bytes_first = sorted(kernels, key=lambda name: not name.startswith(("quantize", "dequantize")))
        steps.append(
            f"mend these kernels first, from the smallest input in right-*.json: {', '.join(bytes_first)}; trust no "
            "load and no figure that goes through them until they are right"
        )
    for stage, advice in (
        ("loads", "a load differs: where `right` is clean, suspect streams, slots and events (checkpoint/device.py)"),
        ("speed", "a kernel failed at the sizes of models: run it alone with bench/kernels.py"),
        ("deeper", "profiling or the default tiles failed; see the log of the stage"),
    ):
        names = [row[1] for row in wrong if row[0] == stage]
        if names:
            steps.append(f"{advice}: {', '.join(names)}")
    below = [row for row in rows if row[3] == BELOW]
    if below:
        named = ", ".join(f"{row[1]} ({row[2].split(' (')[0]})" for row in below[:6])
        steps.append(f"slower than wished, with the traces and tiles of `deeper` to begin with: {named}")
    cut = sorted({row[0] for row in rows if row[3] == CUT})
    if cut:
        steps.append(f"run again with --stages {' '.join(cut)}, or with more minutes: cut off")
    if not steps:
        steps.append("all right and fast enough")
    steps.append(
        "keep the folder under bench/results/ with the device's name, and change docs/platforms.md to what ran"
    )
    return steps
