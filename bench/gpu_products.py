"""How fast a GPU multiplies by quantized weights: linear layers and experts, against BF16 on the same shapes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Queue, Side, speed_up, take_turns
from quantload.kernels.formats import FORMATS, Tensors
from quantload.kernels.registry import Kernel, candidates, kernel_set
from torch import Tensor

SPREAD = 0.02
LEAST_COPIES = 2
TOP_K = 8
ROUTINGS = 8
TORCH_LAUNCHES = 400
"""The plain torch kernels work in tiles: many launches a call."""
TOLERANCES = {"triton": 0.02, "torch": 0.02, "numba": 0.02, "triton_w4a4": 0.25, "aiter": 0.25}
QUANTIZED_ACTIVATIONS = 0.08
"""Error (Frobenius, relative) from which on a product is wrong; that of a kernel not named is for 8-bit activations."""
Attempt = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class How:
    """How everything here is measured, and the names of the kernels that are not."""

    device: torch.device
    queue: Queue
    rotated_bytes: int
    turns: int
    turn_seconds: float
    attempt: Attempt
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Equal copies of one weight [..., rows, cols], in BF16 and quantized, and its float32 meaning."""

    format: str
    bf16: list[Tensor]
    quantized: list[Tensors]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bf16[0].shape)

    @property
    def quantized_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.quantized[0])

    def dequantized(self, device: torch.device) -> Tensor:
        """What the codes stand for, float32 [..., rows, cols]."""
        dequantize = kernel_set(self.format, device).dequantize
        out = torch.empty(self.shape, device=device)
        parts = (out, *self.quantized[0])
        for target, *tensors in [parts] if out.dim() == 2 else zip(*parts, strict=True):
            dequantize(tuple(tensors), target)
        return out


def make_weights(name: str, shape: tuple[int, ...], rotated_bytes: int, device: torch.device) -> Weights:
    """A random weight [rows, cols], or experts [E, rows, cols], and copies: at least `rotated_bytes` quantized."""
    kernels = kernel_set(name, device)
    fmt, (*lead, rows, cols) = kernels.format, shape
    source = torch.empty(shape, dtype=torch.bfloat16, device=device)
    quantized = tuple(
        torch.empty((*lead, *each.shape(rows, cols)), dtype=each.dtype, device=device) for each in fmt.tensors
    )
    parts = (source, *quantized)
    for part, *tensors in zip(*parts, strict=True) if lead else [parts]:
        part.copy_(torch.randn(rows, cols, device=device) * SPREAD)
        kernels.quantize(part, tuple(tensors))
    copies = max(LEAST_COPIES, -(-rotated_bytes // sum(tensor.nbytes for tensor in quantized)))
    clones = [tuple(tensor.clone() for tensor in quantized) for _ in range(copies)]
    return Weights(fmt.name, [source.clone() for _ in range(copies)], clones)


def kernels_of(operation: str, name: str, device: torch.device) -> list[Kernel]:
    """The kernels that can run on the device, best first."""
    return [kernel for kernel, reason in candidates(operation, name, device) if reason is None]


def error_of(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to that of what is expected."""
    return float((got.float() - expected).norm() / expected.norm())


def is_right(kernel: str, error: float) -> bool:
    """Whether an error is what the kernel's rounding explains."""
    return error < TOLERANCES.get(kernel, QUANTIZED_ACTIVATIONS)


def compare(how: How, label: str, sides: dict[str, Side], checks: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """Times of BF16 and of every kernel that gives a right product; what fails or is wrong is named in `attempt`."""
    errors: dict[str, float] = {}
    for name, check in checks.items():
        error = how.attempt(f"{label} {name}", check)
        if error is not None:
            errors[name] = error
    runnable = {name: side for name, side in sides.items() if name == "bf16" or name in errors}
    taken = take_turns(how.queue, runnable, how.turns, how.turn_seconds)
    times = {name: found.to_dict() for name, found in taken.items()}
    ratios = {name: speed_up(times["bf16"], times[name]) for name in times if name != "bf16"}
    print(f"{label}: " + ", ".join(f"{n} {r:.2f}x" for n, r in ratios.items()), file=sys.stderr, flush=True)
    return {"seconds": times, "ratios": ratios, "errors": errors}


def _checked(kernel: str, run: Callable[[], Tensor], expected: Tensor) -> float:
    error = error_of(run(), expected)
    if not is_right(kernel, error):
        raise ValueError(f"the product is off by {error:.3f} of its norm")
    return error


def compare_linear(how: How, weights: Weights, tokens: int) -> dict[str, Any]:
    """One row: BF16 and every kernel of `linear` on one shape and number of tokens."""
    rows, cols = weights.shape
    count = len(weights.bf16)
    kernels = [k for k in kernels_of("linear", weights.format, how.device) if k.name not in how.without]
    x = torch.randn(tokens, cols, device=how.device).bfloat16()
    expected = x.float() @ weights.dequantized(how.device).T
    sides = {"bf16": Side(lambda i: F.linear(x, weights.bf16[i % count]), 2)}
    checks: dict[str, Callable[[], float]] = {}

    def multiply(kernel: Kernel, quantized: list[Tensors], i: int) -> Tensor:
        out: Tensor = kernel(x, quantized[i % count], None, rows, cols)
        return out

    for kernel in kernels:
        run = partial(multiply, kernel, _arranged(kernel, weights))
        sides[kernel.name] = Side(run, TORCH_LAUNCHES if kernel.name == "torch" else 8)
        checks[kernel.name] = partial(_checked, kernel.name, partial(run, 0), expected)
    found = compare(how, f"linear {weights.format} {rows}x{cols} {tokens} tokens", sides, checks)
    facts = {"format": weights.format, "rows": rows, "cols": cols, "tokens": tokens, "copies": count}
    return {**facts, "default": kernels[0].name, "quantized_bytes": weights.quantized_bytes, **found}


def _arranged(kernel: Kernel, weights: Weights) -> list[Tensors]:
    """Weights as the kernel wants them: padded copies of their own where it wants them elsewhere."""
    if kernel.arrangement is None:
        return weights.quantized
    rows, cols = (
        -(-size // step) * step for size, step in zip(weights.shape, kernel.arrangement.multiples, strict=True)
    )
    shapes = FORMATS[weights.format].shapes(rows, cols)
    found = [tuple(map(_padded, tensors, shapes)) for tensors in weights.quantized]
    for tensors in found:
        kernel.arrangement.arrange(tensors)
    return found


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A copy with zeros up to a shape."""
    out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def measure_linear(
    names: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], how: How
) -> list[dict[str, Any]]:
    """A row for every format, shape and number of tokens."""
    return _measure("linear", compare_linear, names, shapes, tokens, how)


def _measure(
    kind: str,
    compare_one: Callable[[How, Weights, int], dict[str, Any]],
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    tokens: Sequence[int],
    how: How,
) -> list[dict[str, Any]]:
    rows = []
    for name, shape in itertools.product(names, shapes):
        label = f"{kind} {name} {'x'.join(map(str, shape))}"
        weights = how.attempt(label, partial(make_weights, name, shape, how.rotated_bytes, how.device))
        for count in tokens if weights is not None else ():
            row = how.attempt(f"{label} {count} tokens", partial(compare_one, how, weights, count))
            rows += [row] if row is not None else []
        del weights
    return rows


@dataclass(frozen=True)
class Routing:
    """Tokens sent to experts: their rows x [T * top_k, k] in the experts' order, and where each expert's begin."""

    x: Tensor
    offsets: Tensor
    borders: list[int]


def route(tokens: int, experts: int, cols: int, device: torch.device) -> Routing:
    """Each of random tokens to different experts, chosen at random."""
    top_k = min(TOP_K, experts)
    chosen = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].flatten()
    counts = torch.bincount(chosen, minlength=experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    x = torch.randn(tokens * top_k, cols, device=device).bfloat16()
    return Routing(x, offsets.to(torch.int32).to(device), offsets.tolist())


def loop_of_products(routing: Routing, weights: Tensor) -> Tensor:
    """BF16 [E, rows, cols]: one product for each expert that has tokens."""
    out = routing.x.new_empty(routing.x.shape[0], weights.shape[1])
    for expert, (start, stop) in enumerate(itertools.pairwise(routing.borders)):
        if start < stop:
            torch.mm(routing.x[start:stop], weights[expert].t(), out=out[start:stop])
    return out


def grouped_kernels(name: str, device: torch.device) -> list[Kernel]:
    """The kernels of `experts` that take all experts at once; those with an arrangement serve whole layers instead."""
    found = kernels_of("experts", name, device)
    return [kernel for kernel in found if kernel.name not in ("torch", "numba") and kernel.arrangement is None]


def compare_experts(how: How, weights: Weights, tokens: int) -> dict[str, Any]:
    """One row: the loop and every kernel of `experts`, calls taking turns through weights and routings."""
    experts, rows, cols = weights.shape
    count, kernels = len(weights.bf16), grouped_kernels(weights.format, how.device)
    routings = [route(tokens, experts, cols, how.device) for _ in range(ROUTINGS)]
    most = max(sum(a < b for a, b in itertools.pairwise(r.borders)) for r in routings)
    dequantized = weights.dequantized(how.device)
    expected = loop_of_products(Routing(routings[0].x.float(), routings[0].offsets, routings[0].borders), dequantized)
    del dequantized

    def loop(i: int) -> Tensor:
        return loop_of_products(routings[i % ROUTINGS], weights.bf16[i % count])

    def grouped(kernel: Kernel, i: int) -> Tensor:
        given = routings[i % ROUTINGS]
        out: Tensor = kernel(given.x, weights.quantized[i % count], None, given.offsets, rows, cols)
        return out

    sides = {"bf16": Side(loop, most)}
    checks: dict[str, Callable[[], float]] = {}
    for kernel in kernels:
        run = partial(grouped, kernel)
        sides[kernel.name] = Side(run)
        checks[kernel.name] = partial(_checked, kernel.name, partial(run, 0), expected)
    label = f"experts {weights.format} {experts}x{rows}x{cols} {tokens} tokens"
    found = compare(how, label, sides, checks)
    facts = {"format": weights.format, "experts": experts, "rows": rows, "cols": cols, "tokens": tokens}
    return {**facts, "copies": count, "top_k": min(TOP_K, experts), "default": kernels[0].name, **found}


def measure_experts(
    names: Sequence[str], shapes: Sequence[tuple[int, int, int]], tokens: Sequence[int], how: How
) -> list[dict[str, Any]]:
    """A row for every format, shape and number of tokens."""
    grouped = [name for name in names if grouped_kernels(name, how.device)]
    return _measure("experts", compare_experts, grouped, shapes, tokens, how)
