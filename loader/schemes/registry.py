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

from ..errors import NoKernelError, PolicyError, UnknownSchemeError, UnsupportedCheckpointError
from ..kernels import registry as kernel_registry
from ..kernels.formats import FORMATS
from ..options import LoadOptions, ScaleMode
from .activations import Activation, choose_activations
from .base import LinearScheme, MoEScheme, Quantizer
from .fp8 import (
    Fp8PerBlockLinear,
    Fp8PerBlockMoE,
    Fp8PerChannelLinear,
    Fp8PerChannelMoE,
    Fp8PerTensorLinear,
    Fp8PerTensorMoE,
)
from .int4 import Int4PerGroupLinear, Int4PerGroupMoE, QuarkInt4Fp8Linear, QuarkInt4Fp8MoE
from .int8 import ExpertsInt8, Int8PerChannelLinear, Int8PerChannelMoE
from .mxfp4 import Mxfp4RowsLinear, Mxfp4RowsMoE, QuarkMxfp4Linear, QuarkMxfp4MoE
from .mxfp6 import Mxfp6E2m3Linear, Mxfp6E2m3MoE, Mxfp6E3m2Linear, Mxfp6E3m2MoE
from .mxfp8 import Mxfp8Linear, Mxfp8MoE
from .prequantized import PrequantizedLinear, PrequantizedMoE
from .stored.weights import StoredActivations

logger = logging.getLogger("quantload")
DEFAULT = "quark_mxfp4"
AS_STORED = "none"

_S = TypeVar("_S", LinearScheme, MoEScheme)


@dataclass(frozen=True)
class SchemeEntry:
    """A name, and the scheme it stands for on linears and on experts; `None` leaves that kind as stored."""

    name: str
    linear: type[LinearScheme] | None
    experts: type[MoEScheme] | None
    weights: str
    scale: str
    aliases: tuple[str, ...] = ()

    def called(self, name: str) -> str:
        """What messages call it where a user gave that name: both, for an alias."""
        return f"{name} ({self.name})" if name in self.aliases else self.name


ENTRIES = (
    SchemeEntry("quark_mxfp4", QuarkMxfp4Linear, QuarkMxfp4MoE, "E2M1", "E8M0 per 32 along K, EVEN"),
    SchemeEntry(
        "mxfp4_rows", Mxfp4RowsLinear, Mxfp4RowsMoE, "E2M1", "E8M0 per 32 along K, EVEN; float32 per row, least error"
    ),
    SchemeEntry("mxfp6_e2m3", Mxfp6E2m3Linear, Mxfp6E2m3MoE, "E2M3", "E8M0 per 32 along K, EVEN"),
    SchemeEntry("mxfp6_e3m2", Mxfp6E3m2Linear, Mxfp6E3m2MoE, "E3M2", "E8M0 per 32 along K, EVEN"),
    SchemeEntry("mxfp8", Mxfp8Linear, Mxfp8MoE, "E4M3", "E8M0 per 32 along K, RCEIL"),
    SchemeEntry("fp8_per_tensor", Fp8PerTensorLinear, Fp8PerTensorMoE, "E4M3", "float32 per tensor, amax/448"),
    SchemeEntry(
        "fp8_per_channel", Fp8PerChannelLinear, Fp8PerChannelMoE, "E4M3", "float32 per row, amax/448", ("ptpc_fp8",)
    ),
    SchemeEntry("fp8_per_block", Fp8PerBlockLinear, Fp8PerBlockMoE, "E4M3", "float32 per 128x128, amax/448"),
    SchemeEntry("int8_per_channel", Int8PerChannelLinear, Int8PerChannelMoE, "INT8", "float32 per row, amax/127"),
    SchemeEntry("experts_int8", None, ExpertsInt8, "INT8", "float32 per row, amax/127; experts only"),
    SchemeEntry(
        "int4_per_group", Int4PerGroupLinear, Int4PerGroupMoE, "INT4", "float16 and zero point per 128, min/max"
    ),
    SchemeEntry(
        "quark_int4fp8_moe",
        QuarkInt4Fp8Linear,
        QuarkInt4Fp8MoE,
        "experts INT4, linears E4M3",
        "float32 per row, amax/7; per tensor, amax/448",
    ),
    SchemeEntry(AS_STORED, None, None, "as stored", "-"),
)

_BY_NAME = {name: entry for entry in ENTRIES for name in (entry.name, *entry.aliases)}


def scheme_names() -> list[str]:
    """Every name `--quantization` takes, aliases included."""
    return ["auto", *_BY_NAME]


def get_entry(name: str) -> SchemeEntry:
    """The entry of a scheme name; `UnknownSchemeError` lists the names there are."""
    try:
        return _BY_NAME[DEFAULT if name == "auto" else name]
    except (KeyError, TypeError):
        raise UnknownSchemeError(f"unknown scheme {name!r}; choose one of {', '.join(scheme_names())}") from None


def _names_with(scale_mode: ScaleMode) -> list[str]:
    """The schemes whose weights have a scale mode."""
    formats = kernel_registry.SCALE_MODES[scale_mode]
    kinds = ((entry.name, entry.linear or entry.experts) for entry in ENTRIES)
    return [name for name, scheme in kinds if scheme is not None and scheme.format_name in formats]


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

    def linear(self, name: str) -> LinearScheme | None:
        """The linear scheme of a name, `None` where it leaves linears as stored."""
        entry = get_entry(name)
        return None if entry.linear is None else self._make(entry.linear, entry.called(name))

    def experts(self, name: str) -> MoEScheme | None:
        """The MoE scheme of a name, `None` where it leaves experts as stored."""
        entry = get_entry(name)
        return None if entry.experts is None else self._make(entry.experts, entry.called(name))

    def prequantized_linear(
        self, name: str, format_name: str, activations: StoredActivations | None
    ) -> PrequantizedLinear:
        """The scheme that keeps the linear layer `name` as a checkpoint stores it."""
        kept: PrequantizedLinear = self._keep(PrequantizedLinear, name, format_name, activations)
        return kept

    def prequantized_experts(
        self, name: str, format_name: str, activations: StoredActivations | None
    ) -> PrequantizedMoE:
        """The scheme that keeps the experts of `name` as a checkpoint stores them."""
        kept: PrequantizedMoE = self._keep(PrequantizedMoE, name, format_name, activations)
        return kept

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
            compiled = pool.submit(self._compile, {dtype}, ())
            yield
            compiled.result()
        self._compile(self._source_dtypes - {dtype}, self._read)

    def _compile(self, dtypes: Iterable[torch.dtype], read: Iterable[str]) -> None:
        start = time.perf_counter()
        functions = [function for name in read for function in kernel_registry.needed_to_read(name, self.device)]
        for scheme, dtype in itertools.product(list(self._made.values()), dtypes):
            functions += kernel_registry.needed_to_load(
                scheme.format_name, self.device, dtype, self._options.stats, scale_mode=self._scale_mode
            )
        kernel_registry.prepare(functions)
        logger.debug("Kernels were ready after %.3f s", time.perf_counter() - start)

    def _keep(self, cls: Any, name: str, format_name: str, activations: StoredActivations | None) -> Any:
        if all(reason is not None for _, reason in kernel_registry.candidates("quantize", format_name, self.device)):
            raise UnsupportedCheckpointError(
                f"{name} is stored as {format_name}, which is only read to be quantized anew: name a quantization, "
                f"such as {DEFAULT}"
            )
        try:
            return cls(*self._arguments(name, format_name, activations, online=False))
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

    def _make(self, cls: Callable[[Quantizer, Activation | None], _S], called: str) -> _S:
        if cls not in self._made:
            format_name = cls.format_name  # type: ignore[attr-defined]
            if format_name not in kernel_registry.SCALE_MODES[self._scale_mode]:
                raise PolicyError(
                    f"{called} has no scale mode {self._scale_mode!r}; leave scale_mode at default, or choose one of "
                    f"{', '.join(_names_with(self._scale_mode))}"
                )
            try:
                self._made[cls] = cls(*self._arguments(called, format_name, None, online=True))
            except LookupError as error:
                raise NoKernelError(str(error)) from error
            self._made[cls].called = called
        made: _S = self._made[cls]
        return made
