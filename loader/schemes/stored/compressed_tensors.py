"""compressed-tensors: groups of layers by target, each with a spec of its weights, its inputs and its file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...errors import CheckpointError
from ...kernels.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, MXFP4, MXFP6_E2M3, MXFP8, NVFP4
from .integers import GROUPS, OF_4_BITS, OF_8_BITS, packed, unpacked
from .layers import Activations, Kept, Layer
from .layouts import Layout, fp8_block, fp8_channel, fp8_tensor, int8_channel, int8_tensor, mx, nvfp4
from .modules import StoredModule
from .patterns import Lookup, Patterns
from .settings import Settings
from .weights import StoredTensor, StoredWeight

_MX = {"mxfp4-pack-quantized": MXFP4, "mxfp6-pack-quantized": MXFP6_E2M3, "mxfp8-quantized": MXFP8}
_FP8: Mapping[str, Layout] = {"tensor": fp8_tensor(), "channel": fp8_channel(), "block": fp8_block()}
_INT8: Mapping[str, Layout] = {"tensor": int8_tensor(), "channel": int8_channel()}
_NVFP4 = "nvfp4-pack-quantized"
_FORMATS = (*_MX, _NVFP4, "float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_BLOCKS = [FP8_BLOCK.block_rows, FP8_BLOCK.block_cols]
_LINEAR, _SHAPE = "Linear", "weight_shape"
_ARGUMENTS = frozenset(
    (
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs", "is_mx"),
    )
)
_GROUP = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})


class CompressedTensors:
    """A checkpoint that llm-compressor or another user of compressed-tensors wrote."""

    method = "compressed-tensors"
    tensors = frozenset(
        (
            *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
            *(_SHAPE, "input_scale", "input_zero_point", "input_global_scale"),
        )
    )
    formats = frozenset(
        (*_MX.values(), NVFP4, FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, *OF_4_BITS, *OF_8_BITS)
    )

    def __init__(self, settings: Settings) -> None:
        self._path = settings.path
        settings.choice("quantization_status", ("compressed",), "compressed")
        self._format = settings.choice("format", (*_FORMATS, "mixed-precision", "dense", None))
        _refuse(settings)
        self._ignore = Patterns(settings.strings("ignore"), f"{settings.path}.ignore")
        targets: dict[str, Layer | Kept] = {}
        for name, group in settings.sections("config_groups"):
            if group is None:
                raise settings.error(f"config_groups.{name}", None, expected="an object")
            layer = self._layer(group)
            for target in group.strings("targets"):
                targets.setdefault(target, layer)
        if not targets:
            raise settings.error("config_groups", settings.get("config_groups"), expected="groups that have targets")
        self._linear = targets.pop(_LINEAR, Kept(f"{settings.path}.config_groups has no target for it"))
        self._named = Lookup(dict(sorted(targets.items())), f"{settings.path}.config_groups")

    def layer(self, module: str) -> Layer | Kept:
        """Ignored, or of the group with the best target: its name, then a regular expression, then `Linear`."""
        pattern = self._ignore.first(module)
        if pattern is not None:
            return Kept(f"{self._path}.ignore has {pattern!r}")
        found = self._named.find(module)
        return self._linear if found is None else found[1]

    def _layer(self, group: Settings) -> Layer | Kept:
        group.known(_GROUP)
        weights = group.section("weights")
        if weights is None:
            return Kept(f"{group.path} quantizes no weights")
        weights.known(_ARGUMENTS)
        weights.choice("dynamic", (False,), False)
        if group.get("format") is None:
            written = self._format
            if written not in _FORMATS:
                raise group.error("format", written, _FORMATS)
        else:
            written = group.choice("format", _FORMATS)
        layout = _of_its_shape(_layout(weights, written))
        inputs = group.section("input_activations")
        if inputs is not None:
            inputs.known(_ARGUMENTS)
        if inputs is None or written == _NVFP4:  # which is only read to be quantized anew
            return Layer(layout)
        return Layer(layout, _activations(inputs))


def _refuse(settings: Settings) -> None:
    """Fields that change what the tensors mean, in ways that are not read here."""
    sparsity = settings.section("sparsity_config")
    if sparsity is not None and sparsity.get("format", "dense") != "dense":
        raise sparsity.error("format", sparsity.get("format"), ("dense",))
    transforms = settings.section("transform_config")
    if transforms is not None:
        transforms.known({"config_groups"})
    if transforms is not None and transforms.get("config_groups"):
        raise transforms.error("config_groups", transforms.get("config_groups"), (None, {}))
    if settings.get("moe_sparsity_config"):
        raise settings.error("moe_sparsity_config", settings.get("moe_sparsity_config"), (None,))


def _strategy(arguments: Settings) -> str:
    """The strategy, which follows from the group size where it is not given."""
    size = arguments.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    return str(arguments.get("strategy", inferred)).lower()


def _layout(weights: Settings, written: str) -> Layout:
    """What tensors a format has; the spec must be one that compressed-tensors writes so."""
    strategy = _strategy(weights)
    if written in _MX:
        fmt = _MX[written]
        weights.choice("num_bits", (fmt.code_bits,), 8)
        weights.choice("type", ("float",), "int")
        weights.choice("symmetric", (True,), True)
        weights.choice("group_size", (fmt.block_cols,))
        return mx(fmt, "weight_packed" if fmt.packed > 1 else "weight")
    if written == _NVFP4:
        weights.choice("num_bits", (NVFP4.code_bits,), 8)
        weights.choice("type", ("float",), "int")
        weights.choice("symmetric", (True,), True)
        weights.choice("group_size", (NVFP4.block_cols,))
        return nvfp4("weight_packed", "weight_global_scale", divided=True)
    if written == "pack-quantized":
        weights.choice("type", ("int",), "int")
        return _integers(weights, strategy, packed)
    kinds = {"float-quantized": ("float",), "int-quantized": ("int",)}.get(written, ("float", "int"))
    kind = weights.choice("type", kinds, "int")
    if kind == "int":
        if strategy in _INT8 and weights.get("num_bits", 8) == 8 and weights.get("symmetric", True) is True:
            return _INT8[strategy]
        return _integers(weights, strategy, unpacked)
    weights.choice("num_bits", (8,), 8)
    weights.choice("symmetric", (True,), True)
    if strategy not in _FP8:
        raise weights.error("strategy", strategy, tuple(_FP8))
    if strategy == "block":
        weights.choice("block_structure", (_BLOCKS, "x".join(map(str, _BLOCKS))))
    return _FP8[strategy]


def _integers(weights: Settings, strategy: str, layout: Callable[[int, int, bool], Layout]) -> Layout:
    bits = weights.choice("num_bits", (4, 8), 8)
    if strategy not in ("group", "channel"):
        raise weights.error("strategy", strategy, ("group", "channel"))
    group = weights.choice("group_size", GROUPS) if strategy == "group" else 0
    return _in_order(weights, group, layout(bits, group, weights.choice("symmetric", (True, False), True)))


def _in_order(weights: Settings, group: int, layout: Layout) -> Layout:
    """A layout whose columns must be in the order of their groups, where `weight_g_idx` says the group of each."""

    def read(module: StoredModule) -> StoredWeight:
        if "weight_g_idx" in module:
            entry = module.take("weight_g_idx", (torch.int32, torch.int64), why="a packed weight")
            groups = module.value(entry).flatten()
            if not torch.equal(groups.long(), torch.arange(len(groups)) // (group or len(groups))):
                raise CheckpointError(
                    f"{entry.name} says that the columns are not in the order of their groups; config.json: "
                    f"{weights.path}.actorder is {weights.get('actorder')!r}; supported: None, 'weight', 'static'; "
                    f"quantize without an activation order that moves columns, or load the original checkpoint"
                )
        return layout(module)

    return read


def _of_its_shape(layout: Layout) -> Layout:
    """A layout that keeps `weight_shape` to be checked, where there is one that was not needed to find the shape."""

    def read(module: StoredModule) -> StoredWeight:
        weight = layout(module)
        if _SHAPE not in module:
            return weight
        entry = module.shaped(_SHAPE, (torch.int64, torch.int32), ((2,),), why="the shape of a stored weight")
        return weight._replace(parts=(*weight.parts, StoredTensor("shape", entry._replace(shape=(1, 2)), 0)))

    return read


def _activations(inputs: Settings) -> Activations:
    inputs.choice("symmetric", (True,), True)
    strategy = _strategy(inputs)
    if inputs.choice("type", ("float", "int"), "int") == "int":
        inputs.choice("num_bits", (8,), 8)
        return _plain_activations(inputs, "int8", strategy)
    bits = inputs.choice("num_bits", (4, 6, 8), 8)
    if bits == 8 and (strategy != "group" or inputs.get("group_size") == _BLOCKS[1]):
        return _plain_activations(inputs, "fp8", strategy)
    if strategy != "group":
        raise inputs.error("strategy", strategy, ("group",))
    inputs.choice("dynamic", (True,), False)
    inputs.choice("group_size", (MXFP8.block_cols,))
    if bits == 8:
        inputs.choice("scale_dtype", ("torch.uint8",))
    return Activations({4: MXFP4, 6: MXFP6_E2M3, 8: MXFP8}[bits].name, True, "group", MXFP8.block_cols)


def _plain_activations(inputs: Settings, kind: str, strategy: str) -> Activations:
    if strategy == "tensor":
        return Activations(kind, inputs.choice("dynamic", (True, False), False), "tensor")
    inputs.choice("dynamic", (True,), False)
    if strategy == "token":
        return Activations(kind, True, "token")
    if strategy != "group" or kind != "fp8":
        raise inputs.error("strategy", strategy, ("tensor", "token", *(("group",) if kind == "fp8" else ())))
    return Activations(kind, True, "group", _BLOCKS[1])
