"""gpt-oss: the experts of a layer in one tensor of MXFP4 blocks, and one of their scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...checkpoint.headers import TensorEntry
from ...errors import CheckpointError
from ...kernels.formats import MXFP4
from .layouts import E8M0, as_bytes
from .modules import Read
from .settings import Settings
from .weights import StoredCheckpoint, StoredTensor, StoredWeight

FORMATS_OF_BLOCKS = frozenset((MXFP4,))
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = MXFP4.block_cols // 2


def read_gpt_oss(
    settings: Settings, tensors: Mapping[str, TensorEntry], read: Read, dtype: torch.dtype
) -> StoredCheckpoint:
    """Every `X_blocks` [E, N, K / 32, 16] with its `X_scales` [E, N, K / 32] is the weight X, in the model [E, K, N].

    `modules_to_not_convert` says nothing that the tensors do not. Raises `CheckpointError` for one that is alone, or
    does not fit the other.
    """
    settings.strings("modules_to_not_convert")
    weights = [_weight(entry, tensors, dtype) for name, entry in tensors.items() if name.endswith(_BLOCKS)]
    taken = {entry.name for weight in weights for entry in weight.entries()}
    plain = {name: entry for name, entry in tensors.items() if name not in taken}
    alone = next((name for name in plain if name.endswith(_SCALES)), None)
    if alone is not None:
        raise _missing(alone.removesuffix(_SCALES) + _BLOCKS, alone)
    return StoredCheckpoint("mxfp4", {weight.name: weight for weight in weights}, plain)


def _weight(blocks: TensorEntry, tensors: Mapping[str, TensorEntry], dtype: torch.dtype) -> StoredWeight:
    name = blocks.name.removesuffix(_BLOCKS)
    scales = tensors.get(name + _SCALES)
    if scales is None:
        raise _missing(name + _SCALES, blocks.name)
    if (
        len(blocks.shape) != 4
        or 0 in blocks.shape
        or blocks.shape != (*scales.shape, _BLOCK_BYTES)
        or blocks.dtype is not torch.uint8
        or scales.dtype not in E8M0
    ):
        raise CheckpointError(
            f"{blocks.name} is {blocks.dtype} {list(blocks.shape)} and {scales.name} is {scales.dtype} "
            f"{list(scales.shape)}; expected torch.uint8 [experts, rows, columns / 32, 16] and the same without the "
            f"last dimension; export the checkpoint again"
        )
    experts, rows, groups, _ = blocks.shape
    codes = StoredTensor("codes", blocks._replace(shape=(experts, rows, groups * _BLOCK_BYTES)))
    parts = (codes, StoredTensor("scale", as_bytes(scales)))
    return StoredWeight(name, MXFP4, experts, rows, groups * MXFP4.block_cols, dtype, parts, transposed=True)


def _missing(name: str, other: str) -> CheckpointError:
    return CheckpointError(f"{name} is missing: {other} says nothing without it; copy or download the checkpoint again")
