"""From the modules of a checkpoint to its weights: every tensor is read, plain, unused for a reason, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...checkpoint.headers import TensorEntry
from ...errors import CheckpointError
from .alike import Alike
from .fused import FusedExperts, modules_of_fused, take_fused
from .layers import Family, Kept, Layer
from .modules import Read, StoredModule, by_module
from .settings import Settings
from .weights import StoredCheckpoint, StoredWeight

_PLAIN_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_CODE_DTYPES = frozenset(
    {
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    }
)
"""Dtypes that mean little without a scale."""
_UNUSED = {
    **dict.fromkeys(
        ("output_scale", "output_zero_point", "output_global_scale"), "the output of a layer is not quantized here"
    ),
    **dict.fromkeys(
        (
            *("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "prob_output_scale"),
            *("k_zero_point", "v_zero_point", "q_zero_point", "k_global_scale", "v_global_scale", "q_global_scale"),
        ),
        "attention and its cache are not quantized here",
    ),
    **dict.fromkeys(
        (
            *("input_scale", "activation_scale", "qscale_act"),
            *("input_zero_point", "input_scale_2", "input_global_scale"),
        ),
        "the input of this layer is not quantized with a scale from the checkpoint",
    ),
}
"""Tensors of quantized layers that nothing here needs, if nothing took them, and why."""

_EXPERT = re.compile(r"(?:.*\.)?experts(?=\.\d+\.)")


def collect(
    family: Callable[[Settings], Family],
    settings: Settings,
    tensors: Mapping[str, TensorEntry],
    read: Read,
    dtype: torch.dtype,
) -> StoredCheckpoint:
    """The weights of a checkpoint whose tensors belong to modules, by what a family makes of its config."""
    return _Collection(family(settings), read, dtype).collect(tensors)


class _Collection:
    """The weights of one checkpoint as they are found."""

    def __init__(self, family: Family, read: Read, dtype: torch.dtype) -> None:
        self._family, self._read, self._dtype = family, read, dtype
        self._weights: dict[str, StoredWeight] = {}
        self._plain: dict[str, TensorEntry] = {}
        self._unused: dict[str, str] = {}
        self._experts: dict[str, dict[bool, str]] = {}
        self._alike: dict[Any, Alike] = {}

    def collect(self, tensors: Mapping[str, TensorEntry]) -> StoredCheckpoint:
        """Sorts the tensors of a checkpoint; raises `CheckpointError` for one that fits nothing."""
        fused = modules_of_fused(tensors)
        for name, found in by_module(tensors).items():
            for weight, own in take_fused(found) if name in fused else ():
                self._add(FusedExperts(f"{name}.{weight}", own, self._read, self._dtype))
            if self._is_quantized(found):
                self._add(StoredModule(name, found, self._read, self._dtype))
            else:
                self._keep(name, found)
        self._check_experts()
        return StoredCheckpoint(self._family.method, self._weights, self._plain, self._unused)

    def _is_quantized(self, found: Mapping[str, TensorEntry]) -> bool:
        weight = found.get("weight")
        if weight is not None and weight.dtype not in _PLAIN_DTYPES:
            return True
        return any(tensor in self._family.tensors for tensor in found)

    def _add(self, module: StoredModule) -> None:
        layer = self._family.layer(module.name)
        if isinstance(layer, Kept):
            raise CheckpointError(
                f"{module.name} is stored quantized, with the tensors {', '.join(sorted(module.left))}, but "
                f"{layer.reason}; correct the config, or export the checkpoint again"
            )
        weight = self._weight(layer, module)
        self._weights[weight.name] = weight
        expert = _EXPERT.match(module.name)
        if expert:
            self._experts.setdefault(expert[0], {}).setdefault(True, module.name)
        for tensor, entry in module.left.items():
            self._place(tensor, entry)

    def _weight(self, layer: Layer, module: StoredModule) -> StoredWeight:
        """Take the weight of a module, read like an earlier one with the same tensors where there was one."""
        key = layer, module.kind
        alike = self._alike.get(key)
        if alike is not None:
            return alike.take(module)
        tensors = dict(module.left)
        weight = layer.read(module)
        if "weight" in module:
            raise CheckpointError(
                f"{weight.name} is stored twice: as it is, and quantized in {weight.codes.entry.name}; "
                f"leave one of them away"
            )
        if not weight.values:
            self._alike[key] = Alike(module, weight, tensors)
        return weight

    def _keep(self, name: str, found: Mapping[str, TensorEntry]) -> None:
        weight = found.get("weight")
        if weight is not None and len(weight.shape) > 1 and (expert := _EXPERT.match(name)):
            self._experts.setdefault(expert[0], {}).setdefault(False, name)
        for tensor, entry in found.items():
            self._place(tensor, entry)

    def _place(self, tensor: str, entry: TensorEntry) -> None:
        if tensor in _UNUSED:
            self._unused[entry.name] = _UNUSED[tensor]
        elif tensor in self._family.tensors or entry.dtype in _CODE_DTYPES:
            raise CheckpointError(
                f"{entry.name} ({entry.dtype}) belongs to a quantized layer, but the config says nothing that would "
                f"read it; the config is of another checkpoint, or does not say all: correct it, or export the "
                f"checkpoint again"
            )
        else:
            self._plain[entry.name] = entry

    def _check_experts(self) -> None:
        """All experts of one fused module are quantized, in whatever formats, or none of them is."""
        for fused, found in self._experts.items():
            if len(found) == 1:
                continue
            layer = self._family.layer(found[False])
            reason = f" ({layer.reason})" if isinstance(layer, Kept) else ""
            raise CheckpointError(
                f"{found[False]} is not quantized{reason}, but {found[True]} is; the experts of {fused} are "
                f"one fused module, quantized or not as a whole: export them alike, or load the original checkpoint"
            )
