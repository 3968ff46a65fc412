"""Which code runs an operation of a format on a device: the only place that looks at the platform.

Every kernel of an operation takes the same arguments; all matrices are 2-D, row-major views with any row stride.
`tensors` is the tuple of all tensors of a weight [R, C], in the order and with the dtypes and shapes that
`WeightFormat.tensors` says: the codes, then the scales. `scales` is that tuple without the codes.

quantize(source, tensors, statistics=None, scales_known=False) -> int
    `source` [R, C] bfloat16, float16 or float32 to codes and scales.
    A piece must hold whole scale blocks, unless `scales_known` says that the scales are final: then it may be any
    part that starts at a block. Adds to the float64 [STATS] `statistics` in place (not atomic: one per thread, or a
    lock). Returns the number of NaN and infinite elements; when it is not 0, codes, scales and statistics are void.
    Scales follow the rule of the format or, in the scale mode "mse", are those of the least squared error.
observe(source, amax) -> int
    amax [amax_shape(R, C)] float32 = max(amax, largest |x| of each block): first pass over a weight that does not
    fit a piece. Not atomic. Returns the number of NaN and infinite elements.
finish_scales(amax, scales) -> None
    Scales from the amax of `observe`, by the arithmetic of `quantize`. A float32 scale tensor of the shape of amax may
    be amax itself. The scale mode "mse" has none, and the formats with a multiplier for each row have neither: amax is
    not enough.
dequantize(tensors, out) -> None
    Into `out` [R, C] float32, bfloat16 or float16; float32 arithmetic, rounded once to the type of `out`.
linear(x, tensors, bias, n_rows, k) -> Tensor
    x [T, k] times the transposed weight [n_rows, k], plus bias [n_rows] or None: [T, n_rows] in the type of x. A bias
    of another type than x is added in float32. The weight is decoded in registers or, to the type of x, in cache-sized
    tiles; never whole. In a kernel set it has a gradient with respect to x and bias, and so has `experts`.
experts(x, tensors, bias, offsets, n_rows, k) -> Tensor
    The same of E weights: `tensors` are [E, ...] each, bias [E, n_rows] or None. Rows [offsets[e], offsets[e + 1]) of
    x meet weight e; `offsets` is int32 or int64 [E + 1], rows past the last one are nobody's and become 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .arrangement import Arrangement
from .formats import FORMATS, Tensors, WeightFormat
from .formats import SCALE_MODES as SCALE_MODES
from .gpu.quantizers import TRITON_MISSING, format_on, stored_format
from .gpu.target import GpuTarget
from .implementations import SCALING, implementations, numba_unavailable
from .implementations import Kernel as Kernel
from .reference.differentiable import Experts, Linear

if TYPE_CHECKING:  # numba is imported where its kernels are used
    from .cpu.compiled import Needed

OPERATIONS = ("quantize", "observe", "finish_scales", "dequantize", "linear", "experts")

PLATFORMS: Mapping[str, GpuTarget | None] = MappingProxyType(
    {"cpu": None, **{name: GpuTarget(name) for name in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")}}
)
"""What kernels are written for: any CPU, and GPUs by their architecture."""


@dataclass(frozen=True)
class PlainLinear:
    """A kernel for products of a few tokens with weights that are no codes: BF16, float16 or float32."""

    name: str
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    """x [T, K] times the transposed weight [N, K], plus bias [N] or None: [T, N]; all in one dtype.

    Products and sums are float32, rounded once."""
    serves: Callable[[torch.Tensor], bool]
    """Whether it can read a weight as that lies in memory, and this processor has what it takes for its dtype."""
    needed: Callable[[torch.dtype, int], Needed[Any]]
    """The compiled function that so many tokens of a dtype will call."""
    most_tokens: Callable[[torch.dtype], int]
    """How many of a dtype it takes; with more of them torch is faster."""


class Prepared(Protocol):
    """`linear` of one weight for a few tokens, as long as the tensors that it was prepared with stay where they are."""

    dtype: torch.dtype
    """Of x, and of the product."""
    columns: int
    most: int
    """Tokens that it can take."""

    def __call__(
        self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """x [..., K] of 1 to `most` tokens, times the transposed weight, plus bias: of `shape` [..., N], contiguous."""


class NoKernel(LookupError):
    """No kernel can serve; the message gives every candidate with its reason."""


@dataclass(frozen=True)
class KernelSet:
    """The kernels chosen for one format on one device."""

    format: WeightFormat
    quantize: Callable[..., int]
    observe: Callable[..., int]
    finish_scales: Callable[..., torch.Tensor]
    dequantize: Callable[..., None]
    linear: Callable[..., torch.Tensor]
    experts: Callable[..., torch.Tensor]
    names: Mapping[str, str] = field(default_factory=dict)
    """Kernel name by operation."""
    scale_mode: str = "default"
    prepare: Callable[..., Prepared | None] | None = None
    """(tensors, n_rows, k, dtype of x): `linear` of one weight, where what is known before saves time in a call."""
    arrangements: Mapping[str, Arrangement] = field(default_factory=dict)
    """What loaded weights go through, by operation; the canonical ones need nothing."""


def candidates(
    operation: str, format_name: str, device: torch.device | str, scale_mode: str = "default"
) -> list[tuple[Kernel, str | None]]:
    """Every kernel for an operation of a format, best first, each with the reason why it cannot run, or None.

    Raises NoKernel for an operation or format that does not exist, and for a scale mode that the format does not have.
    """
    if operation not in OPERATIONS:
        raise NoKernel(f"unknown operation {operation!r}; operations are {', '.join(OPERATIONS)}")
    if format_name not in FORMATS:
        raise NoKernel(f"unknown weight format {format_name!r}; formats are {', '.join(FORMATS)}")
    if format_name not in SCALE_MODES.get(scale_mode, ()):
        modes = ", ".join(mode for mode, formats in SCALE_MODES.items() if format_name in formats)
        raise NoKernel(f"{format_name} has no scale mode {scale_mode!r}; it has {modes}")
    target, mode = torch.device(device), scale_mode if operation in SCALING else "default"
    return [(kernel, _reason(kernel, target)) for kernel in implementations(operation, format_name, mode)]


def kernel_names(operation: str) -> list[str]:
    """The names of all kernels of an operation, of whatever format and device; raises NoKernel for no operation."""
    if operation not in OPERATIONS:
        raise NoKernel(f"unknown operation {operation!r}; operations are {', '.join(OPERATIONS)}")
    kinds = ((name, mode) for mode, formats in SCALE_MODES.items() for name in formats)
    found = (kernel.name for name, mode in kinds for kernel in implementations(operation, name, mode))
    return list(dict.fromkeys(found))


def platform_kernels(operation: str, format_name: str, platform: str) -> list[Kernel]:
    """Every kernel for an operation of a format that the hardware of a platform can run, best first, installed or not.

    Raises NoKernel for a platform that does not exist.
    """
    if platform not in PLATFORMS:
        raise NoKernel(f"unknown platform {platform!r}; platforms are {', '.join(PLATFORMS)}")
    target = PLATFORMS[platform]
    found = implementations(operation, format_on(format_name, target), "default")
    return [kernel for kernel in found if kernel.lacks(target) is None]


def select(
    operation: str,
    format_name: str,
    device: torch.device | str,
    name: str | None = None,
    scale_mode: str = "default",
) -> Kernel:
    """The best kernel that can run, or the one called `name`; NoKernel lists every candidate with its reason.

    A GPU for which nothing but Triton is missing gets no slow kernel instead, unless it is called by its name.
    """
    found = candidates(operation, format_name, device, scale_mode)
    for kernel, reason in found:
        if name is None and reason == TRITON_MISSING:
            break
        if reason is None and name in (None, kernel.name):
            return kernel
    wanted = f"kernel {name!r}" if name else "kernel"
    listed = "; ".join(f"{kernel.name}: {reason or 'can run'}" for kernel, reason in found)
    raise NoKernel(f"no {wanted} for {operation} of {format_name} on {device}; candidates: {listed}")


def kernel_set(
    format_name: str,
    device: torch.device | str,
    overrides: Mapping[str, str] = MappingProxyType({}),
    scale_mode: str = "default",
) -> KernelSet:
    """The best kernel of every operation; `overrides` maps operations to the names of kernels to use instead.

    `scale_mode`, one of `SCALE_MODES`, is how `quantize` chooses scales.

    The format of the set is the one that is stored on the device: E4M3 FNUZ for FP8 on gfx942.

    A name for `linear` is taken for `experts` too, where that has such a kernel and is given no name of its own.
    """
    format_name = stored_format(format_name, torch.device(device))
    unknown = sorted(set(overrides) - set(OPERATIONS))
    if unknown:
        raise NoKernel(f"unknown operations {unknown} in overrides; operations are {', '.join(OPERATIONS)}")
    wanted = dict(overrides)
    if "linear" in wanted and "experts" not in wanted:
        found = candidates("experts", format_name, device)
        if (wanted["linear"], None) in [(kernel.name, reason) for kernel, reason in found]:
            wanted["experts"] = wanted["linear"]
    chosen = {op: select(op, format_name, device, wanted.get(op), scale_mode) for op in OPERATIONS}
    names = MappingProxyType({op: kernel.name for op, kernel in chosen.items()})
    functions: dict[str, Any] = {op: kernel.function for op, kernel in chosen.items()}
    arrangements = {op: kernel.arrangement for op, kernel in chosen.items() if kernel.arrangement is not None}
    fmt, arranged = FORMATS[format_name], chosen["linear"].arrangement or chosen["experts"].arrangement
    functions["linear"] = Linear(fmt, functions["linear"], functions["dequantize"], arranged)
    functions["experts"] = Experts(functions["experts"], functions["linear"])
    return KernelSet(
        format=fmt,
        names=names,
        scale_mode=scale_mode,
        prepare=chosen["linear"].prepare,
        arrangements=MappingProxyType(arrangements),
        **functions,
    )


def weight_only(format_name: str, device: torch.device | str) -> dict[str, str]:
    """Overrides that leave activations as they are, where the best matmul on a device would round them."""
    usable = _usable_matmuls(format_name, device)
    plain = [kernel for kernel in usable if not kernel.rounds_activations]
    return {"linear": plain[0].name} if plain and usable[0].rounds_activations else {}


def quantizing(format_name: str, device: torch.device | str) -> dict[str, str]:
    """Overrides for the best matmul that rounds activations on its own; none where a device has no such kernel."""
    rounding = [kernel for kernel in _usable_matmuls(format_name, device) if kernel.rounds_activations]
    return {"linear": rounding[0].name} if rounding else {}


def _usable_matmuls(format_name: str, device: torch.device | str) -> list[Kernel]:
    found = candidates("linear", stored_format(format_name, torch.device(device)), device)
    return [kernel for kernel, reason in found if reason is None]


def plain_linear(device: torch.device) -> PlainLinear | None:
    """The kernel that a device has for a few tokens and weights that are no codes, or None: torch's own is used."""
    if device.type != "cpu" or numba_unavailable(device) is not None:
        return None
    from .cpu import plain

    return PlainLinear("numba", plain.linear, plain.serves, plain.needed, plain.most_tokens)


def needed_to_load(
    format_name: str,
    device: torch.device | str,
    source_dtype: torch.dtype,
    statistics: bool = True,
    activation_dtype: torch.dtype | None = None,
    scale_mode: str = "default",
) -> list[Needed[Any]]:
    """The compiled functions that a load of `source_dtype` weights will call, and `linear` on `activation_dtype`."""
    format_name = stored_format(format_name, torch.device(device))
    if not _is_compiled("quantize", format_name, device, scale_mode):
        return []
    from .cpu import choose

    return choose.needed_to_load(format_name, source_dtype, statistics, activation_dtype, scale_mode)


def needed_to_serve(kernels: KernelSet, device: torch.device | str, activation_dtype: torch.dtype) -> list[Needed[Any]]:
    """The compiled functions that products of a kernel set with any number of tokens will call."""
    if torch.device(device).type != "cpu" or "numba" not in (kernels.names.get("linear"), kernels.names.get("experts")):
        return []
    from .cpu import choose

    return choose.needed_to_serve(kernels.format.name, activation_dtype)


def needed_to_read(format_name: str, device: torch.device | str) -> list[Needed[Any]]:
    """The compiled functions that dequantize a format to float32."""
    if not _is_compiled("dequantize", format_name, device):
        return []
    from .cpu import dequantize as cpu_dequantize

    return [cpu_dequantize.needed(FORMATS[format_name].read_as, torch.float32)]


def _is_compiled(operation: str, format_name: str, device: torch.device | str, scale_mode: str = "default") -> bool:
    on_cpu = torch.device(device).type == "cpu"
    return on_cpu and select(operation, format_name, device, scale_mode=scale_mode).name == "numba"


def prepare(functions: Sequence[Needed[Any]]) -> None:
    """Compile functions, or fetch them from the disk cache.

    Safe from any thread; returns at once where there is nothing to compile or it is compiled already.
    """
    if functions:
        from .cpu import ahead

        ahead.prepare(functions)


def _reason(kernel: Kernel, device: torch.device) -> str | None:
    if kernel.device_type is not None and kernel.device_type != device.type:
        return f"runs on {kernel.device_type} only, not on {device.type}"
    return kernel.unavailable(device)
