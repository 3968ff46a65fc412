"""AMD Quark: one tensor spec for weights and one for inputs, found by name, pattern, layer type or for all."""

from __future__ import annotations

from collections.abc import Mapping

from ...kernels.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8
from .fields import QUARK_EXPORT, QUARK_LAYER, QUARK_TENSOR
from .integers import INT4_FP8, int4_fp8
from .layers import Activations, Kept, Layer
from .layouts import Layout, fp8_block, fp8_channel, fp8_tensor, int8_channel, int8_tensor, mx
from .packing import PACK_METHODS
from .patterns import Lookup, Patterns
from .settings import Settings

_MX = {"fp4": MXFP4, "fp6_e2m3": MXFP6_E2M3, "fp6_e3m2": MXFP6_E3M2, "fp8_e4m3": MXFP8}
_BLOCKS = [FP8_BLOCK.block_rows, FP8_BLOCK.block_cols]
_LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "fp4": {"per_group": mx(MXFP4)},
    "fp6_e2m3": {"per_group": mx(MXFP6_E2M3)},
    "fp6_e3m2": {"per_group": mx(MXFP6_E3M2)},
    "fp8_e4m3": {
        "per_tensor": fp8_tensor(),
        "per_channel": fp8_channel(),
        "per_block": fp8_block(),
        "per_group": mx(MXFP8),
    },
    "int8": {"per_tensor": int8_tensor(), "per_channel": int8_channel()},
}


class Quark:
    """A checkpoint that AMD Quark exported to the Hugging Face layout."""

    method = "quark"
    tensors = frozenset(
        (
            *("weight_scale", "weight_zero_point", "weight_scale_2", "weight_zero_point_2", "bias_scale"),
            *("input_scale", "input_zero_point", "input_rotation", "input_prescale"),
        )
    )
    formats = frozenset((*_MX.values(), FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, INT4_FP8))

    def __init__(self, settings: Settings) -> None:
        self._path = settings.path
        export = settings.section("export")
        if export is not None:
            export.known(QUARK_EXPORT)
            export.choice("weight_format", ("real_quantized",), "real_quantized")
        self._pack_method = "reorder" if export is None else export.choice("pack_method", PACK_METHODS, "reorder")
        self._exclude = Patterns(settings.strings("exclude"), f"{settings.path}.exclude", globs=True)
        by_name = {name: self._layer(layer) for name, layer in settings.sections("layer_quant_config")}
        self._by_name = Lookup(by_name, f"{settings.path}.layer_quant_config", globs=True)
        types = {name: self._layer(layer) for name, layer in settings.sections("layer_type_quant_config")}
        for name in types:
            if name not in ("Linear", "nn.Linear"):
                raise settings.error("layer_type_quant_config", name, ("Linear",))
        fallback = settings.section("global_quant_config")
        self._fallback = next(iter(types.values())) if types else self._layer(fallback)

    def layer(self, module: str) -> Layer | Kept:
        """Excluded, or as the config says: exact name, then pattern, then layer type, then for all."""
        pattern = self._exclude.first(module)
        if pattern is not None:
            return Kept(f"{self._path}.exclude has {pattern!r}")
        found = self._by_name.find(module)
        return self._fallback if found is None else found[1]

    def _layer(self, settings: Settings | None) -> Layer | Kept:
        if settings is None or settings.get("weight") is None:
            path = self._path if settings is None else settings.path
            return Kept(f"{path} quantizes no weight")
        settings.known(QUARK_LAYER)
        if (bias := settings.get("bias")) is not None:
            raise settings.error("bias", bias, (None,))
        inputs = settings.objects("input_tensors")
        for spec in (*inputs, *settings.objects("weight")):
            spec.known(QUARK_TENSOR)
        if len(inputs) > 1:
            raise settings.error("input_tensors", settings.get("input_tensors"), expected="one object")
        return Layer(self._layout(settings), _activations(inputs[0]) if inputs else None)

    def _layout(self, settings: Settings) -> Layout:
        specs = settings.objects("weight")
        for spec in specs:
            spec.choice("is_dynamic", (False,), False)
        if len(specs) == 1:
            return _layout(specs[0])
        if len(specs) != 2:
            raise settings.error("weight", settings.get("weight"), expected="one object, or two: FP8 and then INT4")
        for spec, dtype, scheme in zip(specs, ("fp8_e4m3", "int4"), ("per_tensor", "per_channel"), strict=True):
            spec.choice("dtype", (dtype,))
            spec.choice("qscheme", (scheme,))
            spec.choice("symmetric", (True,))
        specs[1].choice("ch_axis", (0,))
        return int4_fp8(PACK_METHODS[self._pack_method])


def _layout(spec: Settings) -> Layout:
    dtype = spec.choice("dtype", tuple(_LAYOUTS))
    scheme = spec.choice("qscheme", tuple(_LAYOUTS[dtype]))
    if dtype == "int8":
        spec.choice("symmetric", (True,))
    if scheme == "per_channel":
        spec.choice("ch_axis", (0,))
    if scheme == "per_block":
        spec.choice("block_size", (_BLOCKS,))
    if scheme == "per_group":
        _check_mx(spec)
    return _LAYOUTS[dtype][scheme]


def _activations(spec: Settings) -> Activations:
    dtype = spec.choice("dtype", (*_MX, "int8"))
    dynamic = spec.choice("is_dynamic", (True, False), False)
    if dtype == "int8":
        spec.choice("symmetric", (True,))
    if dtype in ("int8", "fp8_e4m3"):
        plain = "int8" if dtype == "int8" else "fp8"
        scheme = spec.choice("qscheme", ("per_tensor", "per_channel", *(("per_group",) if plain == "fp8" else ())))
        if scheme == "per_tensor":
            return Activations(plain, dynamic, "tensor")
        spec.choice("is_dynamic", (True,), False)
        if scheme == "per_channel":
            return Activations(plain, True, "token")
        if spec.get("group_size") == _BLOCKS[1]:
            return Activations(plain, True, "group", _BLOCKS[1])
    spec.choice("qscheme", ("per_group",))
    spec.choice("is_dynamic", (True,), False)
    _check_mx(spec)
    return Activations(_MX[dtype].name, True, "group", _MX[dtype].block_cols)


def _check_mx(spec: Settings) -> None:
    spec.choice("group_size", (MXFP4.block_cols,))
    spec.choice("scale_format", ("e8m0",))
    spec.choice("ch_axis", (-1, 1), -1)
