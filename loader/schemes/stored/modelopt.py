"""NVIDIA ModelOpt: one algorithm for all layers, or one for each by its name; NVFP4 is read to be quantized anew."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...kernels.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP8, NVFP4
from .fields import CONFIG, MODELOPT_LAYER
from .layers import Activations, Kept, Layer
from .layouts import fp8_block, fp8_channel, fp8_tensor, mx, nvfp4
from .patterns import Patterns
from .settings import Settings

_MIXED = "MIXED_PRECISION"
_NVFP4 = Layer(nvfp4("weight", "weight_scale_2"))
_ALGORITHMS: Mapping[str, Layer] = MappingProxyType(
    {
        "FP8": Layer(fp8_tensor(), Activations("fp8", False, "tensor")),
        "FP8_PER_CHANNEL_PER_TOKEN": Layer(fp8_channel(), Activations("fp8", True, "token")),
        "FP8_PB_WO": Layer(fp8_block(), Activations("fp8", True, "group", FP8_BLOCK.block_cols)),
        "MXFP8": Layer(mx(MXFP8), Activations(MXFP8.name, True, "group", MXFP8.block_cols)),
        "NVFP4": _NVFP4,
        "W4A16_NVFP4": _NVFP4,
    }
)


class ModelOpt:
    """A checkpoint that ModelOpt exported."""

    method = "modelopt"
    tensors = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
    formats = frozenset((FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, MXFP8, NVFP4))

    def __init__(self, settings: Settings) -> None:
        inner = settings.section("quantization")
        if inner is not None:
            inner.known(CONFIG["modelopt"])
        settings = inner or settings
        field = "ignore" if settings.get("ignore") else "exclude_modules"
        self._where = f"{settings.path}.{field}"
        self._ignored = Patterns(settings.strings(field), self._where, globs=True, meaning=_tree)
        self._path = settings.path
        name = str(settings.get("quant_algo")).upper()
        if name not in (*_ALGORITHMS, _MIXED):
            raise settings.error("quant_algo", settings.get("quant_algo"), (*_ALGORITHMS, _MIXED))
        self._fallback = None if name == _MIXED else self._of(settings)
        self._named = {
            module: self._named_layer(layer)
            for module, layer in settings.sections("quantized_layers")
            if layer is not None
        }

    def layer(self, module: str) -> Layer | Kept:
        """Ignored, by its name among the layers of a mixed checkpoint, or like all."""
        pattern = self._ignored.first(module)
        if pattern is not None:
            return Kept(f"{self._where} has {pattern!r}")
        return self._named.get(module) or self._fallback or Kept(f"{self._path}.quantized_layers does not name it")

    def _named_layer(self, settings: Settings) -> Layer:
        settings.known(MODELOPT_LAYER)
        return self._of(settings)

    def _of(self, settings: Settings) -> Layer:
        algorithm = str(settings.get("quant_algo")).upper()
        if algorithm not in _ALGORITHMS:
            raise settings.error("quant_algo", settings.get("quant_algo"), tuple(_ALGORITHMS))
        if _ALGORITHMS[algorithm] is _NVFP4:
            settings.choice("group_size", (NVFP4.block_cols,), NVFP4.block_cols)
        return _ALGORITHMS[algorithm]


def _tree(pattern: str) -> tuple[str, ...]:
    """ModelOpt writes `path*` for a module with everything below it, which other modules that begin so are not."""
    if pattern.endswith("*") and not pattern.endswith((".*", "**")) and len(pattern) > 1:
        return pattern[:-1], f"{pattern[:-1]}.*"
    return (pattern,)
