"""Which code runs an operation of a format on a device: the only place that looks at the platform.

Every kernel of an operation takes the same arguments; all matrices are 2-D, row-major views with any row stride:

quantize(source, codes, scales, statistics=None, scales_known=False) -> int
    `source` [R, C] bfloat16, float16 or float32 to `codes` [code_shape(R, C)] and `scales` [scale_shape(R, C)].
    A piece must hold whole scale blocks, unless `scales_known` says that the scales are final: then it may be any
    part that starts at a block. Adds to the float64 [STATS] `statistics` in place (not atomic: one per thread, or a
    lock). Returns the number of NaN and infinite elements; when it is not 0, codes, scales and statistics are void.
    Scales follow the rule of the format or, in the scale mode "mse", are those of the least squared error.
observe(source, amax) -> int
    amax [scale_shape(R, C)] float32 = max(amax, largest |x| of each block): first pass over a weight that does not
    fit a piece. Not atomic. Returns the number of NaN and infinite elements.
finish_scales(amax, out=None) -> Tensor
    Scales from the amax of `observe`, by the arithmetic of `quantize`, into `out` (None: in place). The scale mode
    "mse" has none, and the formats with a multiplier for each row have neither: amax is not enough.
dequantize(codes, scales, out) -> None
    Into `out` [R, C] float32, bfloat16 or float16; float32 arithmetic, rounded once to the type of `out`.
linear(x, codes, scales, bias, n_rows, k) -> Tensor
    x [T, k] times the transposed weight [n_rows, k], plus bias [n_rows] or None: [T, n_rows] in the type of x. A bias
    of another type than x is added in float32. The weight is decoded in registers or, to the type of x, in cache-sized
    tiles; never whole. In a kernel set it has a gradient with respect to x and bias, and so has `experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from .arrangement import Arrangement
from .differentiable import Experts, Linear
from .experts import ExpertsByLinear
from .formats import FORMATS, INT4FP8_CHANNEL, INTEGERS, MX, RowMultiplied, WeightFormat
from .gpu_matmul import GpuMatmul, gpu_matmuls
from .gpu_quantize import GpuQuantize, format_on, gpu_quantizers, stored_format
from .gpu_target import GpuTarget
from .reference import Reading
from .row_multiplied import MULTIPLIED

OPERATIONS = ("quantize", "observe", "finish_scales", "dequantize", "linear", "experts")

PLATFORMS: Mapping[str, GpuTarget | None] = MappingProxyType(
    {"cpu": None, **{name: GpuTarget(name) for name in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")}}
)
"""What kernels are written for: any CPU, and GPUs by their architecture."""

NUMBA_FORMATS = (
    *(
        "mxfp4",
        "mxfp4_rows",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8",
        "fp8_channel",
        "fp8_tensor",
        "fp8_block",
        "int8_channel",
    ),
    *(fmt.name for fmt in (INT4FP8_CHANNEL, *INTEGERS)),
)


SCALE_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"default": tuple(FORMATS), "mse": tuple(fmt.name for fmt in MX)}
)
"""The formats that have each way to choose scales: by the format's own rule, or by the least squared error."""
SCALING = ("quantize", "finish_scales")
"""The operations that differ between the scale modes."""


class NoKernel(LookupError):
    """No kernel can serve; the message gives every candidate with its reason."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operation of one format; `device_type` None serves every device."""

    name: str
    operation: str
    format: str
    device_type: str | None
    function: Callable[..., Any]
    unavailable: Callable[[torch.device], str | None]
    """Why the kernel cannot run on a device, or None when it can."""
    lacks: Callable[[GpuTarget | None], str | None]
    """The same of hardware that need not be here, with everything installed; None is a CPU."""
    arrangement: Arrangement | None = None
    """What loaded weights go through for `linear` or `experts`; None: they stay canonical."""
    rounds_activations: bool = False
    """Whether a matmul rounds its activations to what goes with the format, dynamically."""
    needs: str = ""
    """A package that installing quantload does not bring."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


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
    return [(kernel, _reason(kernel, target)) for kernel in _kernels(operation, format_name, mode)]


def platform_kernels(operation: str, format_name: str, platform: str) -> list[Kernel]:
    """Every kernel for an operation of a format that the hardware of a platform can run, best first, installed or not.

    Raises NoKernel for a platform that does not exist.
    """
    if platform not in PLATFORMS:
        raise NoKernel(f"unknown platform {platform!r}; platforms are {', '.join(PLATFORMS)}")
    target = PLATFORMS[platform]
    found = _kernels(operation, format_on(format_name, target), "default")
    return [kernel for kernel in found if kernel.lacks(target) is None]


def select(
    operation: str,
    format_name: str,
    device: torch.device | str,
    name: str | None = None,
    scale_mode: str = "default",
) -> Kernel:
    """The best kernel that can run, or the one called `name`; NoKernel lists every candidate with its reason."""
    found = candidates(operation, format_name, device, scale_mode)
    for kernel, reason in found:
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
        format=fmt, names=names, scale_mode=scale_mode, arrangements=MappingProxyType(arrangements), **functions
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


def warm_up(
    format_name: str,
    device: torch.device | str,
    source_dtype: torch.dtype,
    statistics: bool = True,
    activation_dtype: torch.dtype | None = None,
    scale_mode: str = "default",
) -> None:
    """Compile ahead what a load of `source_dtype` weights will call, and `linear` on `activation_dtype` where given.

    Safe from any thread; returns at once where there is nothing to compile or it is compiled already.
    """
    format_name = stored_format(format_name, torch.device(device))
    if select("quantize", format_name, device, scale_mode=scale_mode).name == "numba":
        from . import cpu

        cpu.warm_up(format_name, source_dtype, statistics, activation_dtype, scale_mode)


def _reason(kernel: Kernel, device: torch.device) -> str | None:
    if kernel.device_type is not None and kernel.device_type != device.type:
        return f"runs on {kernel.device_type} only, not on {device.type}"
    return kernel.unavailable(device)


@cache
def _kernels(operation: str, format_name: str, scale_mode: str) -> tuple[Kernel, ...]:
    """All kernels of an operation of a format, best first; a backend for another device is one more entry here."""
    fmt = FORMATS[format_name]
    if isinstance(fmt, RowMultiplied) and operation in MULTIPLIED:
        return tuple(_multiplied(kernel, fmt) for kernel in _kernels(operation, fmt.blocks.name, scale_mode))
    on_cpu = _numba_function(operation, format_name, scale_mode)
    return (
        *_gpu_kernels(operation, format_name, scale_mode),
        Kernel("numba", operation, format_name, "cpu", on_cpu, _numba_reason(format_name), _numba_lacks(format_name)),
        _torch_kernel(operation, format_name, scale_mode),
    )


def _multiplied(kernel: Kernel, fmt: RowMultiplied) -> Kernel:
    """A kernel of the blocks of a format, with the multipliers; arranged scales have no place for them."""
    made = replace(kernel, format=fmt.name, function=MULTIPLIED[kernel.operation](fmt, kernel.function))
    if kernel.arrangement is None:
        return made
    return replace(made, unavailable=_arranged, lacks=_arranged, arrangement=None)


def _arranged(where: torch.device | GpuTarget | None) -> str:
    return "brings scales into an order of its own, where multipliers of rows have no place"


def _gpu_kernels(operation: str, format_name: str, scale_mode: str) -> tuple[Kernel, ...]:
    fmt = FORMATS[format_name]
    found: list[GpuMatmul | GpuQuantize] = [*gpu_matmuls(operation, fmt), *gpu_quantizers(operation, fmt, scale_mode)]
    return tuple(
        Kernel(
            k.name,
            operation,
            format_name,
            "cuda",
            k,
            k.unavailable,
            k.hardware_lacks,
            getattr(k, "arrangement", None),
            getattr(k, "rounds_activations", False),
            getattr(k, "needs", ""),
        )
        for k in found
    )


def _numba_function(operation: str, format_name: str, scale_mode: str) -> Callable[..., Any]:
    if operation == "experts":
        return ExpertsByLinear(FORMATS[format_name], _Numba("linear", format_name, scale_mode))
    return _Numba(operation, format_name, scale_mode)


class _Numba:
    """A CPU operation that imports numba when it is first called."""

    def __init__(self, operation: str, format_name: str, scale_mode: str) -> None:
        self.operation, self.format_name, self.scale_mode = operation, format_name, scale_mode
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.function is None:
            from .cpu import numba_kernels

            self.function = getattr(numba_kernels(self.format_name, self.scale_mode), self.operation)
        return self.function(*args, **kwargs)


def _torch_kernel(operation: str, format_name: str, scale_mode: str) -> Kernel:
    reference = _references(scale_mode)[format_name]
    if operation == "experts":
        function: Callable[..., Any] = ExpertsByLinear(reference.codec.format, reference.linear)
    elif hasattr(reference, operation):
        function = getattr(reference, operation)
    else:
        return Kernel("torch", operation, format_name, None, _never, _only_read, _only_read)
    return Kernel("torch", operation, format_name, None, function, _torch_unavailable, _lacks_nothing)


def _references(scale_mode: str) -> Mapping[str, Reading]:
    from . import fp8, int8, integer, mx, mx_mse, mxfp4, mxfp4_rows, nvfp4

    if scale_mode == "mse":
        return mx_mse.references
    return {
        "mxfp4": mxfp4.reference,
        "mxfp4_rows": mxfp4_rows.reference,
        "int8_channel": int8.reference,
        "nvfp4": nvfp4.reference,
        **fp8.references,
        **mx.references,
        **integer.references,
    }


def _never(*_: Any, **__: Any) -> None:
    raise NoKernel("this format is only read")


def _lacks_nothing(target: GpuTarget | None) -> str | None:
    return None


def _only_read(where: torch.device | GpuTarget | None) -> str | None:
    return "the format is only read, to be quantized anew; choose another one to quantize to"


def _numba_reason(format_name: str) -> Callable[[torch.device], str | None]:
    return _numba_unavailable if format_name in NUMBA_FORMATS else _no_numba_kernels


def _numba_lacks(format_name: str) -> Callable[[GpuTarget | None], str | None]:
    no_kernels = None if format_name in NUMBA_FORMATS else "has no kernels for this format"
    return lambda target: no_kernels if target is None else "runs on cpu only"


def _no_numba_kernels(device: torch.device) -> str | None:
    return "has no kernels for this format"


@cache
def _numba_unavailable(device: torch.device) -> str | None:
    import importlib.util
    import os
    import sys

    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if sys.byteorder != "little":
        return "the kernels assume a little-endian processor"
    return None


def _torch_unavailable(device: torch.device) -> str | None:
    return "the meta device holds no data" if device.type == "meta" else None
