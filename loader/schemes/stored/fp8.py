"""FP8 as DeepSeek writes it, with a scale for each block (`weight_scale_inv`), or with one for each tensor or row.

DeepSeek-V4 calls scales `scale`, and its experts may be MXFP4; Mistral's are `qscale_weight`, of inputs `qscale_act`.
"""

from __future__ import annotations

import torch

from ...kernels.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, MXFP8
from .layers import Activations, Kept, Layer
from .layouts import fp8_block, fp8_channel, fp8_tensor, mx
from .modules import ONE, StoredModule
from .patterns import Prefixes
from .settings import Settings
from .weights import StoredWeight

_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
_INPUT_SCALES = ("input_scale", "activation_scale", "qscale_act")
_FP4 = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
_BLOCKS = [FP8_BLOCK.block_rows, FP8_BLOCK.block_cols]
_MX_BLOCKS = [MXFP8.block_rows, MXFP8.block_cols]


class Fp8:
    """A checkpoint with `quant_method` fp8, or mxfp8, whose blocks need not be said."""

    method = "fp8"
    # Not `scale`, which is a parameter of many modules, nor `qscale_act`, which fake quantizers of attention have.
    tensors = frozenset({*_SCALES, *_INPUT_SCALES} - {"scale", "qscale_act"})
    formats = frozenset((FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, MXFP8, MXFP4))

    def __init__(self, settings: Settings) -> None:
        settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.choice("scale_fmt", ("float", "float32", "ue8m0"), "float")
        usual = _MX_BLOCKS if settings.get("quant_method") == "mxfp8" else None
        self._block = settings.choice("weight_block_size", (None, _BLOCKS, _MX_BLOCKS), usual)
        names = [field for field in ("modules_to_not_convert", "ignored_layers") if settings.get(field)]
        self._where = f"{settings.path}.{names[0] if names else 'modules_to_not_convert'}"
        self._kept = Prefixes(settings.strings("modules_to_not_convert", "ignored_layers"), self._where)
        dynamic = settings.choice("activation_scheme", ("dynamic", "static", None)) == "dynamic"
        # What the config says of inputs is meant for weights in FP8.
        self._layer = Layer(self._layout, self._activations(settings, dynamic), frozenset((MXFP4,)))

    def layer(self, module: str) -> Layer | Kept:
        """Every layer but those that the config names."""
        pattern = self._kept.first(module)
        return self._layer if pattern is None else Kept(f"{self._where} has {pattern!r}")

    def _activations(self, settings: Settings, dynamic: bool) -> Activations | None:
        if settings.get("activation_scheme") is None:
            return None
        if not dynamic:
            return Activations("fp8", False, "tensor", scales=_INPUT_SCALES)
        if self._block is None:
            return Activations("fp8", True, "token")
        if self._block == _MX_BLOCKS:
            return Activations(MXFP8.name, True, "group", MXFP8.block_cols)
        return Activations("fp8", True, "group", FP8_BLOCK.block_cols)

    def _layout(self, module: StoredModule) -> StoredWeight:
        """Which of the layouts a weight has, by the shape of its scale where there are no blocks."""
        scale = next((name for name in _SCALES if name in module), _SCALES[0] if self._block else _SCALES[1])
        codes = module.left.get("weight")
        if codes is not None and codes.dtype in _FP4:
            return mx(MXFP4, scale=scale)(module)
        if self._block == _BLOCKS:
            return fp8_block(scale)(module)
        if self._block == _MX_BLOCKS:
            return mx(MXFP8, scale=scale)(module)
        stored = module.left.get(scale)
        return (fp8_tensor if stored is None or stored.shape in ONE else fp8_channel)(scale)(module)
