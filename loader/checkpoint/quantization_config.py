"""Where a checkpoint says how its weights are quantized: in `config.json`, at one of several places, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedCheckpointError

FIELD = "quantization_config"
MODELOPT_FILE, GPTQ_FILE, AWQ_FILE = "hf_quant_config.json", "quantize_config.json", "quant_config.json"
FILES = (MODELOPT_FILE, GPTQ_FILE, AWQ_FILE)
"""Files of their own that exports of ModelOpt, AutoGPTQ and AutoAWQ had before `config.json` said it."""
_COMPRESSION = "compression_config"
_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}
_DEEPEST = 4
_MIXED = "MIXED_PRECISION"

ReadObject = Callable[[Path], dict[str, Any] | None]


def with_quantization_config(root: Path, config: dict[str, Any], read: ReadObject) -> dict[str, Any]:
    """The config of the checkpoint folder `root` with what it says about quantization in `quantization_config`.

    It stands there; or in the config of a part, such as `text_config`, as vision-language models have it; or it is
    `compression_config`, as the first releases of compressed-tensors called it; or in one of `FILES`, which `read`
    reads. Raises `CheckpointError` for one that is no object, `UnsupportedCheckpointError` for parts that differ.
    """
    said = _object(root, config, FIELD)
    inner, plain = _without(config)
    if said is not None:
        return {**plain, FIELD: _completed(root, said, read)}
    found = [each for _, each in inner]
    if any(each != found[0] for each in found):
        raise UnsupportedCheckpointError(
            f"{root / 'config.json'}: {' and '.join(f'{where}.{FIELD}' for where, _ in inner)} differ; one "
            f"quantization is read for the whole checkpoint: load the checkpoint that this one was made from"
        )
    if not found:
        found = [each for each in (_compression(root, config), _beside(root, read)) if each is not None]
    return {**plain, FIELD: _completed(root, found[0], read)} if found else config


def _object(root: Path, config: Mapping[str, Any], field: str) -> dict[str, Any] | None:
    said = config.get(field)
    if said is not None and not isinstance(said, dict):
        raise CheckpointError(
            f"{root / 'config.json'}: {field} is a {type(said).__name__}, expected a JSON object; copy or download it "
            f"again"
        )
    return said


def _without(config: Mapping[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """What parts of a config say, with their paths, and the config without anything about quantization."""
    found: list[tuple[str, dict[str, Any]]] = []

    def copied(values: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name, value in values.items():
            if name == FIELD and (isinstance(value, dict) or value is None):
                found.extend([(path, value)] if path and value is not None else [])
            elif isinstance(value, dict) and name != _COMPRESSION and depth < _DEEPEST:
                plain[name] = copied(value, f"{path}.{name}" if path else name, depth + 1)
            elif name != _COMPRESSION or path:
                plain[name] = value
        return plain

    return found, copied(config, "", 0)


def _compression(root: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`compression_config`, the oldest of which have a `quantization_config` beside a `sparsity_config`."""
    said = _object(root, config, _COMPRESSION)
    if said is None:
        return None
    inner = _object(root, said, FIELD) or {}
    outer = {name: value for name, value in said.items() if name != FIELD}
    return {"quant_method": "compressed-tensors", **outer, **inner}


def _beside(root: Path, read: ReadObject) -> dict[str, Any] | None:
    """What one of `FILES` says."""
    return next(_files(root, read), None)


def _files(root: Path, read: ReadObject) -> Iterator[dict[str, Any]]:
    if (said := read(root / MODELOPT_FILE)) is not None:
        yield {"quant_method": "modelopt", **said}
    for name, method in ((GPTQ_FILE, "gptq"), (AWQ_FILE, "awq")):
        said = read(root / name)
        if said is None:
            continue
        if _AWQ_NAMES.keys() <= said.keys():
            yield {"quant_method": "awq", **{_AWQ_NAMES.get(field, field): value for field, value in said.items()}}
        elif said.get("quant_method") == method or (name == GPTQ_FILE and {"bits", "group_size"} <= said.keys()):
            yield {"quant_method": method, **said}


def _completed(root: Path, said: dict[str, Any], read: ReadObject) -> dict[str, Any]:
    """What is said; of ModelOpt's mixed precision without its layers, what the file beside it says of them."""
    mixed = str(said.get("quant_algo")).upper() == _MIXED and str(said.get("quant_method")).startswith("modelopt")
    if not mixed or said.get("quantized_layers"):
        return said
    apart = read(root / MODELOPT_FILE)
    return said if apart is None else {"quant_method": said["quant_method"], **apart}
