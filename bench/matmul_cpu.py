"""How fast a quantized weight is multiplied: `linear` of every format against `torch.nn.functional.linear` in BF16.

Both sides see the same shapes, the same threads and as many weights, one after the other in turns (A B A B) of at
least 20 ms; a figure is the median over the turns. Every call takes the next of several equal weights, more than the
last-level cache holds of the quantized ones, as a model that decodes goes from layer to layer. Then, for each format
and large shape in a process of its own, the memory that a call takes at most beyond its output, against the BF16 weight
that must never exist.

    python bench/matmul_cpu.py
    python bench/matmul_cpu.py --formats mxfp4 --shapes 4096x4096 --tokens 1 512
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from goals import Goal, at_least, at_most, print_goals
from load_child import process_memory
from machine import describe_machine, headline
from markdown import markdown
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import kernel_set, needed_to_load, prepare, select
from result_files import RESULTS, write_result
from torch import Tensor

MIB = 1 << 20
FORMATS_MEASURED = ("mxfp4", "fp8_channel", "fp8_block", "int8_channel")
SHAPES = ("4096x4096", "14336x4096", "4096x14336", "768x2048")
DECODE, PREFILL = (1, 2, 4, 8), (64, 512)
PREFILL_GOAL_TOKENS = 512
LARGE = 4096 * 4096
"""Elements from which on the goals hold."""
ROTATED_BYTES = 128 * MIB
"""Of quantized weights: four times the largest last-level cache one core here can fill."""
LEAST_COPIES = 4
TURN_SECONDS = 0.02
TOLERANCE = 0.02
DECODE_GOAL, PREFILL_GOAL, PEAK_GOAL = 1.5, 0.8, 0.25


@dataclass(frozen=True)
class Weights:
    """Equal copies of one weight [rows, cols]: in BF16, and as codes and scales."""

    format: str
    bf16: list[Tensor]
    codes: list[Tensor]
    scales: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.bf16[0].shape
        return rows, cols


def parse_shape(text: str) -> tuple[int, int]:
    """`768x2048` as (rows, cols)."""
    rows, _, cols = text.partition("x")
    return int(rows), int(cols)


def make_weights(format_name: str, shape: tuple[int, int], rotated_bytes: int = ROTATED_BYTES) -> Weights:
    """One random weight, quantized, and copies of it: together at least `rotated_bytes` of codes and scales."""
    kernels = kernel_set(format_name, "cpu")
    source = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    codes = torch.empty(kernels.format.code_shape(*shape), dtype=kernels.format.code_dtype)
    scales = torch.empty(kernels.format.scale_shape(*shape), dtype=kernels.format.scale_dtype)
    kernels.quantize(source, (codes, scales))
    copies = max(LEAST_COPIES, -(-rotated_bytes // (codes.nbytes + scales.nbytes)))
    clones = [[tensor.clone() for _ in range(copies)] for tensor in (source, codes, scales)]
    return Weights(format_name, *clones)


def check(weights: Weights, tokens: int) -> float:
    """Largest error of `linear` relative to the largest value of the reference, which dequantizes and multiplies.

    Raises `ValueError` when it is too large: then the times mean nothing.
    """
    (rows, cols), codes, scales = weights.shape, weights.codes[0], weights.scales[0]
    linear = kernel_set(weights.format, "cpu").linear
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = linear(x, (codes, scales), None, rows, cols).float()
    expected = select("linear", weights.format, "cpu", "torch")(x, (codes, scales), None, rows, cols).float()
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise ValueError(f"linear of {weights.format} at {rows}x{cols}, {tokens} tokens is off by {error:.3f}")
    return error


def compare(weights: Weights, tokens: int, turns: int, turn_seconds: float = TURN_SECONDS) -> dict[str, Any]:
    """Median seconds of a call, for both sides, from `turns` interleaved turns."""
    rows, cols = weights.shape
    linear = kernel_set(weights.format, "cpu").linear
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    copies = len(weights.bf16)
    sides: dict[str, Callable[[int], object]] = {
        "bf16": lambda i: F.linear(x, weights.bf16[i]),
        "quantized": lambda i: linear(x, (weights.codes[i], weights.scales[i]), None, rows, cols),
    }
    calls = {side: _calls_per_turn(run, turn_seconds) for side, run in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    following = dict.fromkeys(sides, 0)
    for _ in range(turns):
        for side, run in sides.items():
            first, count = following[side], calls[side]
            start = time.perf_counter()
            for number in range(first, first + count):
                run(number % copies)
            seconds[side].append((time.perf_counter() - start) / count)
            following[side] = first + count
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "format": weights.format,
        "rows": rows,
        "cols": cols,
        "tokens": tokens,
        "copies": copies,
        "quantized_bytes": weights.codes[0].nbytes + weights.scales[0].nbytes,
        "seconds": medians,
        "seconds_all": seconds,
        "ratio": medians["bf16"] / medians["quantized"],
    }


def _calls_per_turn(run: Callable[[int], object], turn_seconds: float) -> int:
    run(0)
    start = time.perf_counter()
    run(1)
    return max(1, round(turn_seconds / (time.perf_counter() - start)))


def measure_peak(format_name: str, shape: tuple[int, int], tokens: int) -> int:
    """Resident bytes a call takes at most, beyond its output; by the kernel's own high-water mark, so none is missed.

    Run it in a process that has not called a large `linear` yet: memory kept for the next call would hide.
    """
    kernels, (rows, cols) = kernel_set(format_name, "cpu"), shape
    small = make_weights(format_name, (256, 256), 0)
    for count in (1, tokens):  # compiled code and library pages are not the call's
        kernels.linear(torch.ones(count, 256).bfloat16(), (small.codes[0], small.scales[0]), None, 256, 256)
    codes = torch.ones(kernels.format.code_shape(rows, cols), dtype=torch.uint8).view(kernels.format.code_dtype)
    scales = torch.ones(kernels.format.scale_shape(rows, cols), dtype=kernels.format.scale_dtype)
    x = torch.ones(tokens, cols).bfloat16()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
    before = process_memory()["total"]
    out: Tensor = kernels.linear(x, (codes, scales), None, rows, cols)
    return process_memory()["peak_total"] - before - out.nbytes


def peak_of_process(format_name: str, shape: str, tokens: int) -> dict[str, Any]:
    """`measure_peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", format_name, shape, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, cols = parse_shape(shape)
    peak = int(json.loads(done.stdout))
    return {
        "format": format_name,
        "rows": rows,
        "cols": cols,
        "tokens": tokens,
        "peak_bytes": peak,
        "bf16_bytes": 2 * rows * cols,
    }


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """Decode, prefill and memory goals of every format's shapes from 4096x4096 on; the speed goals are MXFP4's."""
    goals = []
    for shape in result["shapes"]:
        rows, cols = parse_shape(shape)
        found = _of(result["rows"], "mxfp4", (rows, cols))
        if rows * cols < LARGE or not found:
            continue
        decode = [row["ratio"] for row in found if row["tokens"] in DECODE]
        prefill = [row["ratio"] for row in found if row["tokens"] == PREFILL_GOAL_TOKENS]
        name = f"mxfp4, decode (slowest of 1 to 8 tokens): >= {DECODE_GOAL}x BF16"
        goals.append(at_least(name, shape, min(decode, default=None), DECODE_GOAL, "x"))
        name = f"mxfp4, prefill ({PREFILL_GOAL_TOKENS} tokens): >= {PREFILL_GOAL}x BF16"
        goals.append(at_least(name, shape, min(prefill, default=None), PREFILL_GOAL, "x"))
    for format_name in result["formats"]:
        shares = [r["peak_bytes"] / r["bf16_bytes"] for r in result["peaks"] if r["format"] == format_name]
        name = f"{format_name}: a call takes at most {PEAK_GOAL} of the BF16 weight beyond its output"
        goals.append(at_most(name, "4096x4096 and up", max(shares, default=None), PEAK_GOAL, " of it"))
    return goals


def render(result: dict[str, Any]) -> str:
    """The table: a row for each format and shape, the ratio to BF16 by tokens, and the memory of a call."""
    tokens = result["tokens"]
    lines = []
    for format_name in result["formats"]:
        for shape in result["shapes"]:
            size = parse_shape(shape)
            rows = {row["tokens"]: row for row in _of(result["rows"], format_name, size)}
            peaks = [row["peak_bytes"] for row in _of(result["peaks"], format_name, size)]
            one = rows[min(rows)]
            micro = " / ".join(f"{one['seconds'][side] * 1e6:.0f}" for side in ("quantized", "bf16"))
            ratios = [f"{rows[count]['ratio']:.2f}x" for count in tokens]
            memory = f"{max(peaks) / MIB:.1f} of {2 * size[0] * size[1] / MIB:.0f}" if peaks else "-"
            lines.append([f"{format_name} {shape}", micro, *ratios, memory])
    header = ["weight", f"us at {min(tokens)}, ours / BF16", *(f"{count} tok" for count in tokens), "MiB of a call"]
    return markdown(lines, header)


def _of(rows: list[dict[str, Any]], format_name: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    return [row for row in rows if (row["format"], row["rows"], row["cols"]) == (format_name, *size)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All comparisons and peaks the command line asks for."""
    rows: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    for name in options.formats:
        prepare(needed_to_load(name, "cpu", torch.bfloat16, False, torch.bfloat16))
        for shape in options.shapes:
            weights = make_weights(name, parse_shape(shape), options.rotated_bytes)
            for tokens in options.tokens:
                error = check(weights, tokens)
                rows.append({**compare(weights, tokens, options.turns), "error": error})
                print(f"{name} {shape} {tokens} tokens: {rows[-1]['ratio']:.2f}x", file=sys.stderr, flush=True)
            del weights
            if math.prod(parse_shape(shape)) >= LARGE:
                peaks += [peak_of_process(name, shape, tokens) for tokens in (1, max(options.tokens))]
    return {"rows": rows, "peaks": peaks}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS_MEASURED), choices=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxCOLS")
    parser.add_argument("--tokens", nargs="+", type=int, default=[*DECODE, *PREFILL])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's, for both sides")
    parser.add_argument("--rotated-bytes", type=int, default=ROTATED_BYTES, help="of quantized weights, all copies")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=3, metavar=("FORMAT", "SHAPE", "TOKENS"), help="print one call's bytes and end")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and the goals, write the dated JSON."""
    options = _arguments()
    if options.peak:
        name, shape, tokens = options.peak
        print(measure_peak(name, parse_shape(shape), int(tokens)))
        return
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    print(headline(machine))
    if machine["load_average"][0] > 1:
        print("warning: the machine is not idle; read the ratios, not the times")
    full = set(FORMATS_MEASURED) <= set(options.formats) and set(SHAPES) <= set(options.shapes)
    full = full and set(options.tokens) >= {*DECODE, *PREFILL} and options.rotated_bytes >= ROTATED_BYTES
    result = {
        "machine": machine,
        "threads": options.threads,
        "turns": options.turns,
        "formats": options.formats,
        "shapes": options.shapes,
        "tokens": options.tokens,
        **measure(options),
    }
    goals = goals_of(result)
    print(f"\ntimes as fast as BF16, {options.threads} threads\n{render(result)}")
    print_goals(goals)
    path = write_result("matmul_cpu", result, options.results, "" if full else "part")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
