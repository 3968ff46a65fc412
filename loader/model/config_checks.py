"""What a config may ask for before transformers makes anything of it: counts that the checkpoint fills, and no code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..checkpoint.folder import CONFIG_NAME
from ..checkpoint.headers import TensorEntry
from ..errors import CheckpointError, UnsupportedCheckpointError

COUNTS_ANYWAY = 1 << 17
"""A count up to here is believed: lists and labels of so many take some tens of megabytes."""
MODULES_ANYWAY = 1 << 13
"""Modules and parameters of a model of any size, some tens of megabytes of objects."""
MODULES_PER_TENSOR = 16
_NUMBERS = frozenset({"num", "n", "number"})
_COUNTED = frozenset(
    {
        *("layer", "layers", "depth", "depths", "expert", "experts", "head", "heads", "label", "labels", "class"),
        *("classes", "codebook", "codebooks", "block", "blocks", "stage", "stages", "group", "groups", "level"),
        *("levels", "quantizers", "repeats"),
    }
)
_OTHER = frozenset(
    {
        *(
            "position",
            "positions",
            "length",
            "len",
            "window",
            "ctx",
            "context",
            "token",
            "tokens",
            "id",
            "ids",
            "theta",
        ),
        *("seed", "param", "params", "parameters", "pixels", "dim", "min", "max", "rate", "sample", "samples"),
        *("step", "steps", "bucket", "buckets", "offset", "base", "flops", "examples"),
    }
)
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_counts(config: Mapping[str, Any], root: Path, tensors: Mapping[str, TensorEntry] | None) -> None:
    """Raise `CheckpointError` for a count of layers, experts, labels and the like that `tensors` cannot fill.

    Nothing there are more of than tensors, or than elements along a dimension of one. `None`: nothing is known of them.
    """
    filled = [entry for entry in (tensors or {}).values() if entry.nbytes]
    most = (
        max(len(filled), *(max(entry.shape, default=0) for entry in filled), COUNTS_ANYWAY) if filled else COUNTS_ANYWAY
    )
    for place, name, value in _integers(config, ""):
        if value > most and _counts(name):
            raise CheckpointError(
                f"{root / CONFIG_NAME}: {place} is {value}, but no tensor of the checkpoint has more than {most:,} of "
                f"anything; copy the file from the original of this checkpoint"
            )


def check_code(config: Mapping[str, Any], root: Path) -> None:
    """Raise `UnsupportedCheckpointError` where the config has transformers fetch code from the hub."""
    for place, _, value in _scalars(config, ""):
        if isinstance(value, str) and "/" in value and any(field in place for field in _IMPLEMENTATIONS):
            raise UnsupportedCheckpointError(
                f"{root / CONFIG_NAME}: {place} is {value[:200]!r}, code that would be fetched and run; remove the "
                f"field, or pass trust_remote_code=True"
            )


def most_modules(tensors: Iterable[TensorEntry]) -> int:
    """Modules and parameters at most of a model that these tensors fill, each expert of a stack counted."""
    filled = sum(entry.shape[0] if len(entry.shape) > 2 else 1 for entry in tensors if entry.nbytes)
    return MODULES_ANYWAY + MODULES_PER_TENSOR * filled


@contextlib.contextmanager
def modules_limited(most: int | None, root: Path) -> Iterator[None]:
    """Raise `CheckpointError` in a model that registers more modules and parameters than `most` in this thread."""
    if most is None:
        yield
        return
    thread, left = threading.get_ident(), most

    def count(module: Any, name: str, value: Any) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise CheckpointError(
                    f"{root / CONFIG_NAME}: asks for a {type(module).__name__} with more than {most:,} modules and "
                    f"parameters, which the tensors of the checkpoint cannot fill; copy the file from the original of "
                    f"this checkpoint"
                )

    hooks = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _counts(name: str) -> bool:
    """Whether a field of this name says how many there are of something."""
    words = name.lower().strip("_").split("_")
    if words[-1] == "size":
        return False
    return (words[0] in _NUMBERS or not _COUNTED.isdisjoint(words)) and _OTHER.isdisjoint(words)


def _integers(value: Any, path: str) -> Iterator[tuple[str, str, float]]:
    for place, name, scalar in _scalars(value, path):
        if isinstance(scalar, (int, float)) and not isinstance(scalar, bool):
            yield place, name, scalar


def _scalars(value: Any, path: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """What stands in nested objects and lists: its place, the name of the field it belongs to, and itself."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "quantization_config":
                yield from _scalars(inner, f"{path}.{key}" if path else key, key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _scalars(inner, f"{path}[{number}]", name)
    else:
        yield path, name, value
