"""How fast pieces of a weight are quantized on a GPU, against the device's copy of the same pieces."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_clock import Queue, Side, speed_up, take_turns
from quantload.kernels.formats import Tensors, WeightFormat
from quantload.kernels.registry import KernelSet, kernel_set, select
from quantload.kernels.statistics import new_statistics
from torch import Tensor

COLUMNS = 4096
SPREAD = 0.02
"""Standard deviation of the random weights."""
QUANTIZING = ("quantize", "+ stats")
WAITING = ("call", "call + stats")
"""The same through `quantize` itself, which reads back the count of elements that are not finite."""


@dataclass(frozen=True)
class Pieces:
    """BF16 pieces [rows, 4096], more than the caches hold, and as many places for copies and quantized ones."""

    sources: list[Tensor]
    copies: list[Tensor]
    quantized: list[Tensors]
    nonfinite: Tensor
    statistics: Tensor


def make_pieces(fmt: WeightFormat, piece_bytes: int, rotated_bytes: int, device: torch.device) -> Pieces:
    """Random pieces of `piece_bytes`, together at least `rotated_bytes`."""
    shape = (piece_bytes // (2 * COLUMNS), COLUMNS)
    count = max(2, -(-rotated_bytes // piece_bytes))
    sources = [(torch.randn(shape, device=device) * SPREAD).bfloat16() for _ in range(count)]
    return Pieces(
        sources,
        [torch.empty_like(source) for source in sources],
        [fmt.empty(*shape, device) for _ in sources],
        torch.zeros(1, dtype=torch.int64, device=device),
        new_statistics(device),
    )


def moved_bytes(fmt: WeightFormat, source: Tensor) -> int:
    """Bytes that quantizing reads and writes; a scale for the whole tensor takes a pass of its own over the source."""
    passes = 1 if all(scale.block_rows for scale in fmt.scales) else 2
    return passes * source.nbytes + fmt.bytes(*source.shape)


def queued_quantize(kernels: KernelSet) -> Callable[..., None] | None:
    """The entry of the chosen quantize kernel that waits for nothing; None where it has none."""
    if kernels.names["quantize"] != "triton":
        return None
    from quantload.kernels.gpu.quantize import triton_quantize

    return triton_quantize(kernels.format.name).enqueue_quantize


def sides_of(kernels: KernelSet, pieces: Pieces) -> dict[str, Side]:
    """The copy, and each way to quantize."""
    count, enqueue = len(pieces.sources), queued_quantize(kernels)

    def copy(i: int) -> object:
        return pieces.copies[i % count].copy_(pieces.sources[i % count])

    def queue(statistics: Tensor | None, i: int) -> object:
        assert enqueue is not None
        at = i % count
        return enqueue(pieces.sources[at], pieces.quantized[at], pieces.nonfinite, statistics)

    def call(statistics: Tensor | None, i: int) -> object:
        at = i % count
        return kernels.quantize(pieces.sources[at], pieces.quantized[at], statistics)

    given = (None, pieces.statistics)
    sides = {"copy": Side(copy, 1)}
    if enqueue is not None:
        sides |= {name: Side(partial(queue, stats)) for name, stats in zip(QUANTIZING, given, strict=True)}
    return sides | {name: Side(partial(call, stats), 64) for name, stats in zip(WAITING, given, strict=True)}


def differing_codes(kernels: KernelSet, device: torch.device) -> int:
    """Bytes of the tensors of a small piece that are not the torch reference's."""
    fmt, name = kernels.format, kernels.format.name
    source = (torch.randn(256, COLUMNS, device=device) * SPREAD).bfloat16()
    rows, cols = source.shape
    found = []
    for quantize in (kernels.quantize, select("quantize", name, device, "torch").function):
        tensors = fmt.empty(rows, cols, device)
        for tensor in tensors:
            tensor.view(torch.uint8).zero_()
        quantize(source, tensors, new_statistics(device))
        found.append([tensor.view(torch.uint8) for tensor in tensors])
    return sum(int((ours != theirs).sum()) for ours, theirs in zip(*found, strict=True))


def measure_piece(
    name: str,
    piece_bytes: int,
    rotated_bytes: int,
    device: torch.device,
    queue: Queue,
    turns: int,
    turn_seconds: float,
) -> dict[str, Any]:
    """One row: seconds of every side, bytes they move, and each side's share of the copy's bandwidth."""
    kernels = kernel_set(name, device)
    pieces = make_pieces(kernels.format, piece_bytes, rotated_bytes, device)
    wrong = differing_codes(kernels, device)
    taken = take_turns(queue, sides_of(kernels, pieces), turns, turn_seconds)
    times = {side: found.to_dict() for side, found in taken.items()}
    if int(pieces.nonfinite):
        raise ValueError(
            f"quantize of {name} found {int(pieces.nonfinite)} elements that are not finite; there are none"
        )
    source = pieces.sources[0]
    moved = {side: 2 * source.nbytes if side == "copy" else moved_bytes(kernels.format, source) for side in times}
    return {
        "format": name,
        "kernel": kernels.names["quantize"],
        "piece_bytes": piece_bytes,
        "pieces": len(pieces.sources),
        "differing": wrong,
        "moved_bytes": moved,
        "seconds": times,
        "share_of_copy": {
            side: speed_up(times["copy"], times[side]) * moved[side] / moved["copy"] for side in times if side != "copy"
        },
    }


def measure_pieces(
    names: Sequence[str],
    sizes: Sequence[int],
    attempt: Callable[..., dict[str, Any] | None],
    **how: Any,
) -> list[dict[str, Any]]:
    """A row for every format and size of piece; `attempt(label, function)` keeps what fails from ending the rest."""
    rows = []
    for name in names:
        for size in sizes:
            label = f"quantize {name} {size >> 20} MiB"
            row = attempt(label, partial(measure_piece, name, size, **how))
            if row is not None:
                rows.append(row)
                shares = ", ".join(f"{side} {share:.2f}" for side, share in row["share_of_copy"].items())
                print(f"{label}: of the copy's bandwidth: {shares}", file=sys.stderr, flush=True)
    return rows
