"""Checks of one kernel on one input, against the torch reference on the CPU; each raises `Wrong` or returns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from quantload.kernels.formats import FORMATS, FP8, FP8_FNUZ, SCALE_MODES, TENSOR_SCALED, RowMultiplied, Tensors
from quantload.kernels.reference.choose import reference
from quantload.kernels.reference.experts import ExpertsByLinear
from quantload.kernels.reference.operations import tensor_rows
from quantload.kernels.registry import Kernel, candidates
from quantload.kernels.scale_rules import FP8_BLOCK_MIN_AMAX, FP8_LARGEST
from quantload.kernels.statistics import AMAX, COUNT, MAX_ERROR, NOISE, new_statistics
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EPS32 = torch.finfo(torch.float32).eps
NATIVE_FP8_EPS = 2.0**-12
"""Relative to the sum of |products|: the FP8 matrix units of Hopper add up in fewer bits than float32 has."""
EXPERTS = 4


class Wrong(Exception):
    """A kernel gave something else than the reference."""


@dataclass(frozen=True)
class Target:
    """A kernel of an operation of a format; `mode` is how scales are chosen."""

    operation: str
    format: str
    kernel: str
    mode: str = "default"

    @property
    def label(self) -> str:
        return " ".join((self.operation, self.format, self.kernel, *([self.mode] if self.mode != "default" else [])))


@dataclass(frozen=True)
class Case:
    """An input: a weight [rows, cols] of values of about 2^exponent, and activations or sources of a type."""

    rows: int
    cols: int
    dtype: str
    seed: int = 0
    exponent: int = 0
    tokens: int = 0
    bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def targets(device: torch.device, names: Sequence[str]) -> list[Target]:
    """Every kernel that can run on the device, of formats by name in their order, torch's own last.

    Those that rearrange weights are left out.
    """
    found = []
    for name, operation in itertools.product(names, CHECKS):
        for mode in SCALE_MODES if operation == "quantize" else ("default",):
            if name in SCALE_MODES[mode]:
                kernels = usable(operation, name, device, mode)
                found += [Target(operation, name, kernel.name, mode) for kernel in kernels]
    return sorted(found, key=lambda target: target.kernel == "torch")


def usable(operation: str, name: str, device: torch.device, mode: str = "default") -> list[Kernel]:
    """Those to test: on a CPU the torch kernel is what the others are tested against."""
    found = [kernel for kernel, reason in candidates(operation, name, device, mode) if reason is None]
    return [k for k in found if k.arrangement is None and (k.name != "torch" or device.type != "cpu")]


@lru_cache(maxsize=512)
def kernel_of(target: Target, device: torch.device) -> Kernel:
    """The kernel of a target."""
    found = usable(target.operation, target.format, device, target.mode)
    return next(kernel for kernel in found if kernel.name == target.kernel)


def check(target: Target, case: Case, device: torch.device) -> float:
    """Run the kernel on the input; returns how far it is off as a share of what is allowed (0: the same bytes)."""
    return CHECKS[target.operation](target, case, device)


def weights(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """Values with blocks of other sizes, some zeros of both signs."""
    generator = torch.Generator().manual_seed(case.seed)
    lift = torch.exp(torch.randn(case.rows, -(-case.cols // 16), generator=generator)).repeat_interleave(16, 1)
    source = torch.randn(case.rows, case.cols, generator=generator) * lift[:, : case.cols] * 2.0**case.exponent
    source[0, ::7], source[-1, ::5] = -0.0, 0.0
    dtype = dtype or DTYPES[case.dtype]
    return source.clamp(-(top := torch.finfo(dtype).max), top).to(dtype)


def filled(name: str, source: Tensor, device: torch.device) -> Tensors:
    """Tensors for the codes of a source, with bytes that no kernel has written."""
    tensors = FORMATS[name].empty(source.shape[0], source.shape[1], device)
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(77)
    return tensors


def quantized(name: str, source: Tensor, mode: str = "default") -> Tensors:
    """What the reference makes of a source."""
    tensors = filled(name, source, torch.device("cpu"))
    if reference(name, mode).quantize(source, tensors):
        raise ValueError("the source has elements that are not finite")
    return tensors


def same_bytes(what: str, got: Tensors, want: Tensors) -> None:
    """Raise `Wrong` with the first byte that differs."""
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        left, right = (t.cpu().contiguous().view(torch.uint8).flatten() for t in (one, other))
        differing = (left != right).nonzero()
        if len(differing):
            at = int(differing[0])
            raise Wrong(
                f"{what}: {len(differing)} of {len(right)} bytes of tensor {number} differ, first at {at}: "
                f"{int(left[at])} instead of {int(right[at])}"
            )


def check_quantize(target: Target, case: Case, device: torch.device) -> float:
    """Bytes and statistics in one call, and, where the format has maxima, the bytes of the two passes."""
    kernel, source, name = kernel_of(target, device), weights(case), target.format
    want, expected = filled(name, source, torch.device("cpu")), new_statistics()
    reference(name, target.mode).quantize(source, want, expected)
    moved, got, measured = source.to(device), filled(name, source, device), new_statistics(device)
    count = kernel(moved, got, measured)
    if count:
        raise Wrong(f"counted {count} elements that are not finite; there are none")
    same_bytes("quantize", got, want)
    close(measured.cpu(), expected)
    if target.mode == "default" and not isinstance(FORMATS[name], RowMultiplied):
        check_two_passes(target, moved, want, device)
    return 0.0


def close(got: Tensor, want: Tensor) -> None:
    """Statistics as those of the reference, but for the order of additions and the float32 of differences."""
    allowed = 1e-5 * want.abs()
    allowed[NOISE] = 20 * allowed[NOISE] + want[COUNT] * (4 * EPS32 * want[AMAX]) ** 2
    allowed[MAX_ERROR] += 4 * EPS32 * want[AMAX]
    off = (got - want).abs() > allowed
    if bool(off.any()):
        at = int(off.nonzero()[0])
        raise Wrong(f"statistic {at} is {float(got[at])!r} instead of {float(want[at])!r}")


def check_two_passes(target: Target, source: Tensor, want: Tensors, device: torch.device) -> None:
    """Maxima and codes in two parts: the bytes of one."""
    fmt, (rows, cols) = FORMATS[target.format], source.shape
    step = fmt.rows_in_common or 1  # where all rows share a scale, the maxima may be of any parts
    cut = max(step, rows // 2 // step * step)
    parts = [(0, min(cut, rows)), (min(cut, rows), rows)]
    run = {op: kernel_of(replace(target, operation=op), device) for op in ("quantize", "observe", "finish_scales")}
    amax, got = torch.zeros(fmt.amax_shape(rows, cols), device=device), filled(fmt.name, source, device)
    for first, last in parts:
        if first < last:
            run["observe"](source[first:last], amax[slice(*fmt.maxima.rows(first, last))])
    run["finish_scales"](amax, got[1:])
    for first, last in parts:
        if first < last:
            run["quantize"](source[first:last], tensor_rows(fmt, got, first, last), scales_known=True)
    same_bytes("two passes", got, want)


def check_dequantize(target: Target, case: Case, device: torch.device) -> float:
    """All bytes as codes, under scales of a weight: the bytes of the reference, NaN where it has NaN.

    The kernels for CPUs read the codes of NaN, which quantizing never makes, as numbers.
    """
    name, dtype = target.format, DTYPES[case.dtype]
    tensors = quantized(name, weights(case, torch.float32))
    codes = tensors[0].view(torch.uint8)
    generator = torch.Generator().manual_seed(case.seed)
    codes.copy_(((torch.arange(codes.numel()) + case.seed) % 256).to(torch.uint8).view(codes.shape))
    if FORMATS[name].code_bits == 6:  # a code is in more than one byte
        codes.copy_(torch.randint(256, codes.shape, generator=generator, dtype=torch.uint8))
    want, got = (
        torch.empty(case.rows, case.cols, dtype=dtype),
        torch.empty(case.rows, case.cols, dtype=dtype, device=device),
    )
    reference(name).dequantize(tensors, want)
    kernel_of(target, device)(tuple(tensor.to(device) for tensor in tensors), got)
    nan = want.isnan()
    if target.kernel != "numba" and not torch.equal(got.cpu().isnan(), nan):
        raise Wrong("NaN elsewhere than in the reference")
    same_bytes("dequantize", (got.cpu().masked_fill(nan, 0),), (want.masked_fill(nan, 0),))
    return 0.0


def meaning(name: str, tensors: Tensors, case: Case, dtype: torch.dtype) -> Tensor:
    """The values of a weight as it meets x: decoded to its type where scales go along K."""
    fmt = FORMATS[name].read_as
    along_k = fmt.scale_dtype == torch.uint8 or fmt.scale_words == 2
    out = torch.empty(case.rows, case.cols, dtype=dtype if along_k and fmt is FORMATS[name] else torch.float32)
    reference(name).dequantize(tensors, out)
    return out.double()


def rounded(name: str, x: Tensor) -> Tensor:
    """The values that activations have once they are codes; scales are per block, token, tensor or 1 x 128."""
    fmt = FORMATS[name].read_as
    if fmt.family in (FP8, FP8_FNUZ) and fmt.block_rows > 1:
        blocks = F.pad(x.float(), (0, -x.shape[1] % 128)).view(-1, 128)
        largest = FP8_LARGEST if fmt.family is FP8 else fmt.largest
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=FP8_BLOCK_MIN_AMAX) / largest
        codes = (blocks * scale.reciprocal()).to(fmt.code_dtype)
        return (codes.float() * scale).view(x.shape[0], -1)[:, : x.shape[1]].double()
    out = torch.empty(x.shape)
    parts = zip(x.split(1), out.split(1), strict=True) if fmt.family is TENSOR_SCALED else [(x, out)]
    for part, values in parts:
        reference(fmt.name).dequantize(quantized(fmt.name, part), values)
    return out.double()


def share_of_allowed(kernel: Kernel, got: Tensor, want: Tensor, magnitude: Tensor, seen: Tensor) -> float:
    """How far a product is off, as a share of what rounding allows; more than 1 is `Wrong`.

    Each element may be rounded twice to the type of the result, and be a float32 sum of products in another order:
    `magnitude` is the sum of |products|. Results, and weights that the activations `seen` meet, may be as coarse as the
    subnormals of the type. All together may be off by two roundings.
    """
    eps, own = torch.finfo(got.dtype).eps, got.cpu().double()
    sums = 64 * EPS32
    if kernel.rounds_activations and FORMATS[kernel.format].read_as.element in ("e4m3", "fnuz"):
        sums += NATIVE_FP8_EPS
    fmt = FORMATS[kernel.format]  # powers of two change no digits, but multipliers and other scales do
    decoded = eps / 2 if isinstance(fmt, RowMultiplied) or fmt.scale_element != "e8m0" else 0.0
    if bool(own.isnan().any()):
        raise Wrong(f"{int(own.isnan().sum())} NaN in the product")
    step = torch.finfo(got.dtype).smallest_normal * eps
    coarse = step * (1 + seen.abs().sum(1, keepdim=True))
    bound = want.abs() * 2 * eps + magnitude * (sums + decoded) + coarse
    worst = float(((own - want).abs() / bound).max())
    whole = float(
        (own - want).norm() / (want.norm() * 2 * eps + magnitude.norm() * sums + coarse.norm() * want.shape[1] ** 0.5)
    )
    if max(worst, whole) > 1:
        raise Wrong(f"off by {worst:.3g} of what rounding allows in one element, {whole:.3g} in all")
    return max(worst, whole)


def check_linear(target: Target, case: Case, device: torch.device) -> float:
    """Against the float64 product with what the codes stand for, activations rounded where the kernel rounds them."""
    kernel, dtype = kernel_of(target, device), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.tokens, case.cols, generator=generator).to(dtype)
    bias = torch.randn(case.rows, generator=generator).to(dtype) if case.bias else None
    tensors = quantized(target.format, weights(case, torch.float32) * 0.05)
    weight, seen = meaning(target.format, tensors, case, dtype), x.double()
    if kernel.rounds_activations:
        seen = rounded(target.format, x)
    want = F.linear(seen, weight, None if bias is None else bias.double())
    magnitude = F.linear(seen.abs(), weight.abs(), None if bias is None else bias.double().abs())
    moved = tuple(tensor.to(device) for tensor in tensors)
    got = kernel(x.to(device), moved, None if bias is None else bias.to(device), case.rows, case.cols)
    if got.shape != want.shape or got.dtype != dtype:
        raise Wrong(f"the product is {got.dtype} {list(got.shape)}")
    return share_of_allowed(kernel, got, want, magnitude, seen)


def check_experts(target: Target, case: Case, device: torch.device) -> float:
    """The same for experts, of which one is idle, with rows at the end that are nobody's."""
    kernel, dtype = kernel_of(target, device), DTYPES[case.dtype]
    made = [
        quantized(target.format, weights(replace(case, seed=case.seed + e), torch.float32) * 0.05)
        for e in range(EXPERTS)
    ]
    tensors = tuple(torch.stack(each) for each in zip(*made, strict=True))
    generator = torch.Generator().manual_seed(case.seed)
    counts = torch.randint(case.tokens + 1, (EXPERTS,), generator=generator)
    counts[case.seed % EXPERTS], counts[(case.seed + 1) % EXPERTS] = 0, case.tokens
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).to(torch.int32)])
    used = int(offsets[-1])
    x = torch.randn(used + 3, case.cols, generator=generator).to(dtype)
    got = kernel(x.to(device), tuple(t.to(device) for t in tensors), None, offsets.to(device), case.rows, case.cols)
    if bool(got[used:].any()):
        raise Wrong("rows that are nobody's are not 0")
    seen = x.double()
    if kernel.rounds_activations and not isinstance(kernel.function, ExpertsByLinear):
        seen = rounded(target.format, x)
    worst = 0.0
    for expert, (first, last) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        if first < last:
            weight, rows = meaning(target.format, made[expert], case, dtype), seen[first:last]
            want, magnitude = F.linear(rows, weight), F.linear(rows.abs(), weight.abs())
            worst = max(worst, share_of_allowed(kernel, got[first:last], want, magnitude, rows))
    return worst


CHECKS = {
    "quantize": check_quantize,
    "dequantize": check_dequantize,
    "linear": check_linear,
    "experts": check_experts,
}
