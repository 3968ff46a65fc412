"""Stage "deeper": where the time of a load and of a decode goes, and other tile sizes for the slowest products."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import make
from gpu_clock import CudaQueue, Queue, Side, speed_up, take_turns
from gpu_day_loads import scale_of
from gpu_day_record import Record, Steps, check_device, first_line
from gpu_day_speed import HostQueue
from gpu_facts import rotated_bytes
from gpu_products import Weights, error_of, is_right, make_weights
from quantload import load_quantized
from quantload.kernels.formats import FORMATS
from quantload.kernels.gpu.matmuls import gpu_matmuls
from quantload.kernels.gpu.target import GpuTarget, gpu_target
from quantload.kernels.gpu.tiles import Tiles
from torch import Tensor

SLOWEST = 3
DECODED = 8
"""Tokens of the decode that is profiled."""
LINES = 15
DRY_TARGET = GpuTarget("sm_90", 4)
DRY = {"format": "int8_channel", "kernel": "triton", "rows": 64, "cols": 128, "tokens": 2}
"""In Triton's interpreter."""


def run(record: Record, device: torch.device, options: argparse.Namespace) -> None:
    """Profiles, then tiles, while there is time."""
    steps = Steps(record, device, options.until, "profiles", "tiles")
    folder = make("dense", scale_of(options.dry), options.work)
    steps.step("profiles", "profile of a load", partial(profile_load, folder, device, options.out))
    steps.step("profiles", "profile of a decode", partial(profile_decode, folder, device, options.out))
    queue: Queue = HostQueue() if options.dry else CudaQueue(device)
    for row in [DRY] if options.dry else slowest(options.out / "speed.json"):
        what = f"tiles of {row['format']} {row['kernel']} {row['rows']}x{row['cols']} {row['tokens']} tokens"
        steps.step("tiles", what, partial(try_tiles, row, device, queue, options))


def profiled(what: str, work: Callable[[], object], device: torch.device, trace: Path) -> dict[str, Any]:
    """What took longest, by its own time on the device (on a CPU there), and a trace for a browser in a file."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as prof:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    prof.export_chrome_trace(str(trace))
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(prof.key_averages(), key=lambda event: getattr(event, own), reverse=True)
    lines = [{"name": e.key, "calls": e.count, "microseconds": getattr(e, own)} for e in events[:LINES]]
    return {"what": what, "longest": lines}


def profile_load(folder: Path, device: torch.device, out: Path) -> dict[str, Any]:
    """Of a second load; the first one compiles."""
    load_quantized(folder, "quark_mxfp4", device=device)
    return profiled(
        "load", lambda: load_quantized(folder, "quark_mxfp4", device=device), device, out / "trace-load.json.gz"
    )


def profile_decode(folder: Path, device: torch.device, out: Path) -> dict[str, Any]:
    """Of some tokens of one sequence."""
    model = load_quantized(folder, "quark_mxfp4", device=device)
    given = torch.arange(3, 19, device=device)[None]

    def decode() -> None:
        with torch.inference_mode():
            model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=DECODED,
                min_new_tokens=DECODED, pad_token_id=0,
            )  # fmt: skip

    decode()
    return profiled("decode", decode, device, out / "trace-decode.json.gz")


def slowest(speed: Path) -> list[dict[str, Any]]:
    """The products of few tokens by Triton's default kernels that gain least over BF16, each kernel and format once."""
    if not speed.is_file():
        return []
    rows = [row for row in json.loads(speed.read_text()).get("linear", ()) if row["tokens"] <= 64]
    rows = [row for row in rows if row["default"].startswith("triton") and row["default"] in row["ratios"]]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: float(row["ratios"][row["default"]])):
        found.setdefault((row["format"], row["default"]), {**row, "kernel": row["default"]})
    return list(found.values())[:SLOWEST]


def candidates_near(tiles: Tiles, k: int) -> Iterator[Tiles]:
    """Tiles that differ from the default in one size, or in rows and warps; columns divide k as the default's do."""
    for rows in (32, 64, 128):
        for warps in (4, 8):
            yield replace(tiles, rows=rows, warps=warps)
    for columns in (64, 128, 256):
        if k % columns == 0 or k % tiles.columns:
            yield replace(tiles, columns=columns)
    for stages in (2, 3, 4, 5):
        yield replace(tiles, stages=stages)
    yield replace(tiles, warps=2)


def try_tiles(row: dict[str, Any], device: torch.device, queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    """Speed of every candidate relative to the default tiles; those that cannot be launched or are wrong say why."""
    linear: Any = importlib.import_module("quantload.kernels.gpu.linear")  # needs Triton
    dry = options.dry
    target = DRY_TARGET if dry else gpu_target(device)
    assert target is not None
    name, rows, cols, tokens = row["format"], row["rows"], row["cols"], row["tokens"]
    way = way_of(name, row["kernel"])
    weights = make_weights(name, (rows, cols), 0 if dry else rotated_bytes(device), device)
    x = torch.randn(tokens, cols, device=device).to(torch.float32 if dry else torch.bfloat16)
    expected = x.float() @ weights.dequantized(device).T
    plain = linear.WAYS[way]
    default = plain.tiles(FORMATS[name], target, tokens, cols, x.dtype.itemsize)
    near = list(dict.fromkeys((default, *candidates_near(default, cols))))[: 3 if dry else None]
    product = partial(multiply, linear.TritonLinear(FORMATS[name], way, target), x, weights)
    sides: dict[str, Side] = {}
    left_out: dict[str, str] = {}
    for tiles in near:
        ways = {**linear.WAYS, way: replace(plain, tiles=lambda *_, tiles=tiles: tiles)}
        run_tiles = partial(with_ways, linear, ways, product)
        label = " ".join(f"{key} {value}" for key, value in asdict(tiles).items())

        why = trouble(row["kernel"], run_tiles, expected, device)
        if why is None:
            sides[label] = Side(run_tiles)
        elif tiles == default:
            raise ValueError(f"the default tiles, {label}: {why}")
        else:
            left_out[label] = why
    taken = take_turns(queue, sides, 1 if dry else 3, 0.0 if dry else 0.01)
    times = {label: found.to_dict() for label, found in taken.items()}
    first = next(iter(times))
    ratios = {label: speed_up(times[first], times[label]) for label in times}
    best = max(ratios, key=lambda label: ratios[label])
    facts = {key: row[key] for key in ("format", "kernel", "rows", "cols", "tokens")}
    return {**facts, "default": first, "ratios": ratios, "best": best, "best_ratio": ratios[best], "left out": left_out}


def trouble(kernel: str, run_tiles: Callable[[int], Tensor], expected: Tensor, device: torch.device) -> str | None:
    """Why tiles do not work, such as too little shared memory, or None where they do."""
    try:
        error = error_of(run_tiles(0), expected)
    except Exception as failure:
        check_device(device)
        return first_line(failure)
    return None if is_right(kernel, error) else f"the product is off by {error:.3f} of its norm"


def multiply(kernel: Callable[..., Tensor], x: Tensor, weights: Weights, i: int) -> Tensor:
    """The i-th product, each with other copies of the weight."""
    rows, cols = weights.shape
    return kernel(x, weights.quantized[i % len(weights.quantized)], None, rows, cols)


def with_ways(module: Any, ways: Any, product: Callable[[int], Tensor], i: int) -> Tensor:
    """A product while the launcher has other tiles."""
    before, module.WAYS = module.WAYS, ways
    try:
        return product(i)
    finally:
        module.WAYS = before


def way_of(name: str, kernel: str) -> str:
    """The way of `gpu.ways` that a Triton kernel of `linear` goes."""
    found = [k for k in gpu_matmuls("linear", FORMATS[name]) if k.name == kernel and k.module == "linear"]
    if not found:
        raise ValueError(f"{kernel} of {name} is not launched by TritonLinear")
    return str(found[0].arguments[0])
