"""Stage "loads": the same model as on the CPU? The demo model under every scheme, and two checkpoints of 3 GB.

Codes and scales are compared byte by byte, tokens one by one with the logits behind them, the large models by checksums
of their final tensors, several loads after each other; and memory with what the plan promised.
"""

from __future__ import annotations

import argparse
import gc
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import make
from gpu_day_record import Record, Steps
from gpu_load import load_once
from quantload import load_quantized
from quantload.cli import DEMO_MODEL
from quantload.kernels.registry import weight_only
from quantload.memory.probes import AnonymousRssProbe
from quantload.schemes.opaque import plain
from quantload.schemes.registry import ENTRIES
from torch import Tensor

LARGE = (("dense", "quark_mxfp4"), ("moe", "quark_mxfp4"), ("dense", "fp8_per_channel"), ("moe", "experts_int8"),
         ("dense", "nvfp4"), ("moe", "quark_int4fp8_moe"))  # fmt: skip
DRY_SCALE = 0.002
DRY_SCHEMES = ("quark_mxfp4", "nvfp4")
LOADS = 3
"""Of each large checkpoint on the device: what streams do wrong, they do not do each time."""
PROMPT = "def read_lines(path):\n    "
NEW_TOKENS = 24
LOGITS_TOLERANCE, ROUNDING_TOLERANCE = 0.03, 0.5
"""Difference of logits (root of the mean square, relative to their spread): of the same weights and activations; with
activations that one side rounds."""
MARGIN = 6.0
"""A difference of tokens is explained by a margin up to so many times the difference of logits."""


def scale_of(dry: bool) -> float:
    """Of the large checkpoints."""
    return DRY_SCALE if dry else 1.0


def make_checkpoints(work: Path, dry: bool) -> None:
    """Make what the later stages load."""
    for name in ("dense", "moe"):
        make(name, scale_of(dry), work)


def run(record: Record, device: torch.device, options: argparse.Namespace) -> None:
    """The demo model under all schemes, then the large ones."""
    steps = Steps(record, device, options.until, "demo", "large")
    schemes = [entry.name for entry in ENTRIES if not options.dry or entry.name in DRY_SCHEMES]
    first = schemes[:4]
    for scheme in first:
        steps.step("demo", f"demo {scheme}", partial(compare_demo, scheme, device))
    for name, scheme in LARGE[:2] if options.dry else LARGE:
        steps.step("large", f"{name} {scheme}", partial(compare_large, name, scheme, device, options))
    for scheme in schemes[len(first) :]:
        steps.step("demo", f"demo {scheme}", partial(compare_demo, scheme, device))


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: plain(tensor) for name, tensor in named}


def checksums(model: Any) -> dict[str, int]:
    """Of the bytes of every tensor; -0.0 and 0.0 differ, as in files."""
    found = {}
    for name, tensor in tensors_of(model).items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found[name] = zlib.crc32(data.numpy().data)
    return found


def differing(one: dict[str, int], other: dict[str, int]) -> list[str]:
    """Names of tensors that are not the same on both sides."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def stored_alike(one: Any, other: Any) -> bool:
    """Whether both sides should have the same bytes: not with E4M3 FNUZ on one, nor with aiter's arrangement."""
    layers = [model.load_report.layers for model in (one, other)]
    formats = [[layer.format for layer in found] for found in layers]
    return formats[0] == formats[1] and not any("aiter" in layer.kernel for found in layers for layer in found)


def compare_demo(scheme: str, device: torch.device) -> dict[str, Any]:
    """Bytes, then tokens, of the demo model on the CPU and on the device."""
    from transformers import AutoTokenizer

    ours, theirs = (load_quantized(DEMO_MODEL, scheme, device=place) for place in (device, "cpu"))
    compared = stored_alike(ours, theirs)
    different = differing(checksums(ours), checksums(theirs)) if compared else []
    inputs = AutoTokenizer.from_pretrained(DEMO_MODEL)(PROMPT, return_tensors="pt")["input_ids"]
    rounds = any(weight_only(layer.format, device) for layer in ours.load_report.layers if layer.format)
    tokens = compare_tokens(generate(ours, inputs), generate(theirs, inputs), rounds)
    kernels = sorted({layer.kernel for layer in ours.load_report.layers})
    found = {"scheme": scheme, "compared": compared, "differing": different, "kernels": kernels, **tokens}
    return {**found, "right": not different and tokens["explained"]}


def generate(model: Any, inputs: Tensor) -> tuple[list[int], Tensor]:
    """Greedy tokens and the float32 logits [tokens, vocabulary] that chose them."""
    given = inputs.to(model.device)
    with torch.inference_mode():
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    return out.sequences[0, inputs.shape[1] :].tolist(), torch.stack([step[0] for step in out.logits]).float().cpu()


def compare_tokens(one: tuple[list[int], Tensor], other: tuple[list[int], Tensor], rounds: bool) -> dict[str, Any]:
    """How many tokens are the same, and what explains the first that is not: the margin between the two best logits.

    The logits have to be near all the same, up to there: everything before them was.
    """
    (left, ours), (right, theirs) = one, other
    same = next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )
    compared = min(same + 1, len(ours), len(theirs))
    difference = (ours[:compared] - theirs[:compared]).square().mean().sqrt()
    spread = theirs[:compared].std()
    relative = float(difference / spread)
    found: dict[str, Any] = {"tokens": len(right), "same": same, "logits_off": relative, "rounds_activations": rounds}
    near = relative < (ROUNDING_TOLERANCE if rounds else LOGITS_TOLERANCE)
    if left == right:
        return {**found, "explained": near}
    if same >= compared:  # one of them ended
        return {**found, "explained": False}
    best = theirs[same].topk(2)
    found["margin"] = float(best.values[0] - best.values[1])
    found["margin_of_difference"] = found["margin"] / max(float(difference), 1e-9)
    return {**found, "explained": near and found["margin_of_difference"] < MARGIN}


def compare_large(name: str, scheme: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Checksums of some loads on the device against one on the CPU, and memory against the plan."""
    folder = make(name, scale_of(options.dry), options.work)
    model = load_quantized(folder, scheme, device="cpu")
    expected, theirs = checksums(model), model.to("meta")
    gc.collect()
    load_once(folder, scheme, device)  # compiles
    loads, different = [], set[str]()
    for _ in range(1 if options.dry else LOADS):
        with AnonymousRssProbe() as host:
            before = host.current()
            host.reset_peak()
            loaded: list[Any] = []
            found = load_once(folder, scheme, device, loaded.append)
            found["host_over"] = host.peak() - before
        compared = stored_alike(loaded[0], theirs)
        different |= set(differing(checksums(loaded[0]), expected)) if compared else set()
        loads.append(found)
        if time.time() > options.until:
            break
    worst = max(loads, key=lambda load: load["peak_bytes"] - load["final_bytes"])
    allowed = worst["staging_bytes"] + worst["slack_bytes"]
    over = worst["peak_bytes"] - worst["final_bytes"]
    host_over = max(load["host_over"] for load in loads)
    host_allowed = allowed + (worst["final_bytes"] if device.type == "cpu" else 0)
    return {
        "checkpoint": name,
        "scheme": scheme,
        "loads": len(loads),
        "seconds": min(load["seconds"] for load in loads),
        "kernels": worst["kernels"],
        "compared": compared,
        "differing": sorted(different)[:20],
        "differing_count": len(different),
        "final_bytes": worst["final_bytes"],
        "over_final": over,
        "host_over": host_over,
        "allowed": allowed,
        "right": not different and over <= allowed and host_over <= host_allowed,
    }
