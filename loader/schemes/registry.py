"""The schemes a user can name."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import NoKernelError, PolicyError, UnsupportedCheckpointError
from ..kernels import formats
from ..kernels import registry as kernel_registry
from ..kernels.formats import FORMATS, WeightFormat
from ..options import LoadOptions, ScaleMode
from ..shortage import COMPILER_STACK_BYTES, starting
from .activations import Activation, choose_activations
from .base import LinearScheme, MoEScheme, Quantizer
from .linear import QuantizedLinearScheme
from .moe import QuantizedMoEScheme
from .names import AUTO, aliases_of, known_name
from .stored.weights import StoredActivations

logger = logging.getLogger("quantload")
DEFAULT = "quark_mxfp4"
AS_STORED = "none"
PREQUANTIZED = "prequantized"
"""What the scheme of weights that stay as a quantized checkpoint stores them is called."""

_S = TypeVar("_S", QuantizedLinearScheme, QuantizedMoEScheme)


@dataclass(frozen=True)
class SchemeEntry:
    """A scheme: a name, and the formats it brings linear layers and experts into; `None` leaves that kind as stored.

    `scale` says how scales are chosen.
    """

    name: str
    linear: WeightFormat | None
    experts: WeightFormat | None
    scale: str

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names."""
        return aliases_of(self.name)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """By kind of layer."""
        kinds = {"linear": self.linear, "experts": self.experts}
        return {kind: fmt for kind, fmt in kinds.items() if fmt is not None}

    @property
    def weights(self) -> str:
        """What people call the codes."""
        labels = {kind: fmt.label for kind, fmt in self.formats.items()}
        if len(set(labels.values())) > 1:
            return f"experts {labels['experts']}, linears {labels['linear']}"
        return next(iter(labels.values()), "as stored")

    def has_mode(self, scale_mode: str) -> bool:
        """Whether all of its formats have a scale mode."""
        return all(scale_mode in fmt.scale_modes for fmt in self.formats.values())

    def called(self, name: str) -> str:
        """What messages call it where a user gave that name: both, for an alias."""
        return f"{name} ({self.name})" if name in self.aliases else self.name


def _both(name: str, fmt: WeightFormat, scale: str) -> SchemeEntry:
    return SchemeEntry(name, fmt, fmt, scale)


# quark_mxfp4 and MXFP6 have the bytes that AMD Quark exports, mxfp8 those of torchao, int4_per_group those of AutoAWQ;
# quark_int4fp8_moe has the codes that SGLang makes of experts, with its INT4 scale times its FP8 scale, and the FP8 it
# makes of linear layers. What mxfp4_rows and nl4 make keeps more of what weights were, and no other tool reads it.
ENTRIES = (
    _both("quark_mxfp4", formats.MXFP4, "E8M0 per 32 along K, EVEN"),
    _both("mxfp4_rows", formats.MXFP4_ROWS, "E8M0 per 32 along K, EVEN; float32 per row, least error"),
    _both("mxfp6_e2m3", formats.MXFP6_E2M3, "E8M0 per 32 along K, EVEN"),
    _both("mxfp6_e3m2", formats.MXFP6_E3M2, "E8M0 per 32 along K, EVEN"),
    _both("mxfp8", formats.MXFP8, "E8M0 per 32 along K, RCEIL"),
    _both("fp8_per_tensor", formats.FP8_TENSOR, "float32 per tensor, amax/448"),
    _both("fp8_per_channel", formats.FP8_CHANNEL, "float32 per row, amax/448"),
    _both("fp8_per_block", formats.FP8_BLOCK, "float32 per 128x128, amax/448"),
    _both("nvfp4", formats.NVFP4, "E4M3 per 16 along K, float32 per tensor, amax/2688"),
    _both("nl4", formats.NL4, "E4M3 per 32 along K, least error of four; float32 per row, a power of two"),
    _both("int8_per_channel", formats.INT8_CHANNEL, "float32 per row, amax/127"),
    SchemeEntry("experts_int8", None, formats.INT8_CHANNEL, "float32 per row, amax/127; experts only"),
    _both("int4_per_group", FORMATS["int4_group128_f16"], "float16 and zero point per 128, min/max"),
    SchemeEntry(
        *("quark_int4fp8_moe", formats.FP8_TENSOR, formats.INT4FP8_CHANNEL),
        "float32 per row, amax/7; per tensor, amax/448",
    ),
    SchemeEntry(AS_STORED, None, None, "-"),
)

_BY_NAME = {name: entry for entry in ENTRIES for name in (entry.name, *entry.aliases)}


def get_entry(name: str) -> SchemeEntry:
    """The entry of a scheme name; `UnknownSchemeError` lists the names there are."""
    name = known_name(name)
    return _BY_NAME[DEFAULT if name == AUTO else name]


def _names_with(scale_mode: ScaleMode) -> list[str]:
    """The schemes whose weights have a scale mode."""
    kinds = ((entry.name, entry.linear or entry.experts) for entry in ENTRIES)
    return [name for name, fmt in kinds if fmt is not None and scale_mode in fmt.scale_modes]


def choose_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; `auto` is the accelerator if quantload has kernels for it, else the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise PolicyError(f"device is {device!r}; choose auto, cpu, or a torch device such as cuda:0") from error
    own = (kernel.device_type == "cuda" for kernel, _ in kernel_registry.candidates("quantize", "mxfp4", "cuda"))
    return torch.device("cuda" if torch.cuda.is_available() and any(own) else "cpu")


class SchemeFactory:
    """Makes the schemes of one load: one instance for each name and kind, with kernels for one device."""

    def __init__(self, device: torch.device, options: LoadOptions, scale_mode: ScaleMode = "default") -> None:
        self.device = device
        self._options = options
        self._scale_mode = scale_mode
        self._made: dict[Any, Any] = {}
        self._source_dtypes: set[torch.dtype] = set()
        self._read: set[str] = set()
        self._lacking: list[str] = []

    def linear(self, name: str) -> LinearScheme | None:
        """The linear scheme of a name, `None` where it leaves linears as stored."""
        entry = get_entry(name)
        return None if entry.linear is None else self._make(QuantizedLinearScheme, entry, entry.linear, name)

    def experts(self, name: str) -> MoEScheme | None:
        """The MoE scheme of a name, `None` where it leaves experts as stored."""
        entry = get_entry(name)
        return None if entry.experts is None else self._make(QuantizedMoEScheme, entry, entry.experts, name)

    def prequantized_linear(
        self, name: str, format_name: str, activations: StoredActivations | None
    ) -> QuantizedLinearScheme:
        """The scheme that keeps the linear layer `name` as a checkpoint stores it."""
        return self._keep(QuantizedLinearScheme, name, format_name, activations)

    def prequantized_experts(
        self, name: str, format_name: str, activations: StoredActivations | None
    ) -> QuantizedMoEScheme:
        """The scheme that keeps the experts of `name` as a checkpoint stores them."""
        return self._keep(QuantizedMoEScheme, name, format_name, activations)

    def warn_of_missing_scales(self) -> None:
        """Say which layers have static activations by the config and no scale for them in the checkpoint, if any."""
        if self._lacking:
            logger.warning(
                "%d layers have no input_scale, such as %s, and the config says that their inputs are quantized with "
                "one: with activations='none' they are not",
                len(self._lacking),
                self._lacking[0],
            )

    def dequantizer(self, format_name: str) -> Callable[..., None]:
        """The kernel that turns stored codes of a format into the values they stand for, in float32."""
        self._read.add(format_name)
        self.expect(torch.float32)
        try:
            return kernel_registry.select("dequantize", format_name, self.device)
        except LookupError as error:
            raise NoKernelError(str(error)) from error

    def expect(self, dtype: torch.dtype) -> None:
        """Weights of `dtype` will be quantized."""
        self._source_dtypes.add(dtype)

    @contextmanager
    def compiling(self, dtype: torch.dtype) -> Iterator[None]:
        """Meanwhile, compile in another thread, or fetch from the disk cache, what weights of `dtype` will call.

        Ends when both are done, with the first error of either. What turns out to be called for other weights than
        those of `dtype` is compiled then, so that all is there before the first weight.
        """
        with ThreadPoolExecutor(1, "quantload-compile") as pool:
            with starting("the thread that gets kernels ready", COMPILER_STACK_BYTES):
                compiled = pool.submit(self._compile, {dtype}, ())
            yield
            compiled.result()
        self._compile(self._source_dtypes - {dtype}, self._read)

    def _compile(self, dtypes: Iterable[torch.dtype], read: Iterable[str]) -> None:
        start = time.perf_counter()
        functions = [function for name in read for function in kernel_registry.needed_to_read(name, self.device)]
        for scheme, dtype in itertools.product(list(self._made.values()), dtypes):
            functions += kernel_registry.needed_to_load(
                scheme.kernels.format.name, self.device, dtype, self._options.stats, scale_mode=self._scale_mode
            )
        kernel_registry.prepare(functions)
        logger.debug("Kernels were ready after %.3f s", time.perf_counter() - start)

    def _keep(self, cls: type[_S], name: str, format_name: str, activations: StoredActivations | None) -> _S:
        if all(reason is not None for _, reason in kernel_registry.candidates("quantize", format_name, self.device)):
            raise UnsupportedCheckpointError(
                f"{name} is stored as {format_name}, which is only read to be quantized anew: name a quantization, "
                f"such as {DEFAULT}"
            )
        if activations is not None and activations.lacks_scale:
            self._lacking.append(name)
        try:
            return cls(PREQUANTIZED, *self._arguments(name, format_name, activations, online=False))
        except LookupError as error:
            raise NoKernelError(f"{name} is stored as {format_name}: {error}") from error

    def _arguments(
        self, name: str, format_name: str, stored: StoredActivations | None, *, online: bool
    ) -> tuple[Quantizer, Activation | None]:
        """What a scheme is made of: the kernels for its weights, and what its activations are rounded to."""
        choice = choose_activations(
            FORMATS[format_name], stored, self._options.activations, self.device, name=name, online=online
        )
        overrides = {**choice.kernels, **self._options.kernels}
        scale_mode = self._scale_mode if online else "default"
        kernels = kernel_registry.kernel_set(format_name, self.device, overrides, scale_mode)
        return Quantizer(kernels, self._options.stats, self.device), choice.emulated

    def _make(self, cls: type[_S], entry: SchemeEntry, fmt: WeightFormat, name: str) -> _S:
        key, called = (entry.name, cls), entry.called(name)
        if key not in self._made:
            if self._scale_mode not in fmt.scale_modes:
                raise PolicyError(
                    f"{called} has no scale mode {self._scale_mode!r}; leave scale_mode at default, or choose one of "
                    f"{', '.join(_names_with(self._scale_mode))}"
                )
            try:
                self._made[key] = cls(entry.name, *self._arguments(called, fmt.name, None, online=True))
            except LookupError as error:
                raise NoKernelError(str(error)) from error
            self._made[key].called = called
        made: _S = self._made[key]
        return made
