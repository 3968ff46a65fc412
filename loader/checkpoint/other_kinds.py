"""What was given instead of a folder with safetensors weights: what it is, and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ..errors import ModelNotFoundError, QuantloadError, TruncatedShardError, UnsupportedCheckpointError
from ..kernels.system_calls import open_plain

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".partial", ".download")
_NAMES_SHOWN = 5
_ORIGINAL = "give the checkpoint it was made from, in safetensors, which quantload quantizes while it loads"
_MERGE = "merge it into its base model (peft: merge_and_unload) and save that with save_pretrained"
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ID = r"[\w.-]+/[\w.-]+"


class _Kind(NamedTuple):
    """Weights of another kind, by the ends of their files' names."""

    ends: tuple[str, ...]
    what: str
    advice: str


_KINDS = (
    _Kind((".gguf", ".ggml"), "GGUF, which llama.cpp reads", _ORIGINAL),
    _Kind(
        PICKLES,
        "pickle files, which can run code when opened",
        "convert them once with transformers, from_pretrained(...).save_pretrained(folder), which writes safetensors",
    ),
    _Kind((".onnx", ".onnx_data", ".ort"), "ONNX", _ORIGINAL),
    _Kind((".h5", ".keras"), "TensorFlow weights", "save them as safetensors with transformers, in PyTorch"),
    _Kind((".msgpack",), "Flax weights", "save them as safetensors with transformers, in PyTorch"),
    _Kind((".npz",), "NumPy or MLX weights", _ORIGINAL),
    _Kind((".mlmodel", ".mlpackage", ".tflite", ".engine", ".plan", ".xml"), "a compiled model", _ORIGINAL),
)
_HEADS = {
    b"version ": "a Git LFS pointer, some lines of text in the place of the file; run 'git lfs pull' in the folder, or "
    "download the file itself with 'hf download'",
    b"GGUF": f"a GGUF file; {_ORIGINAL}",
    b"PK\x03\x04": "a zip archive, as torch.save writes it; convert it once with transformers' save_pretrained, which "
    "writes safetensors",
    b"\x80\x02": "a pickle; convert it once with transformers' save_pretrained, which writes safetensors",
    b"<!DOCTYP": "a web page that was saved instead of the file; download the file itself with 'hf download'",
    b"<!doctyp": "a web page that was saved instead of the file; download the file itself with 'hf download'",
    b"<html": "a web page that was saved instead of the file; download the file itself with 'hf download'",
}
"""What files begin with that are no safetensors file."""


def some(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join(name[:200] for name in list(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN:,} more"


def kind_of_head(head: bytes) -> str | None:
    """What a file is that begins so, and what to do; None where it may be a safetensors file, or JSON."""
    return next((what for begin, what in _HEADS.items() if head.startswith(begin)), None)


def reference_error(given: str, revision: str | None) -> QuantloadError | None:
    """The error for a URL, or for `org/model@revision`; None for what may be a folder or a hub id."""
    url = _URL.match(given)
    path = given[url.end() :] if url else given
    host, _, rest = path.partition("/")
    if (url and host.lower() in _HUB_HOSTS) or (not url and host.lower() in _HUB_HOSTS and rest.count("/") > 0):
        return _hub_address(given, rest)
    named = re.fullmatch(rf"({_ID})@(\S+)", given)
    if named and not os.path.lexists(given):
        return ModelNotFoundError(
            f"{given!r} is a hub id with a revision; give it as {_with_revision(*named.groups())}"
        )
    return None


def _hub_address(given: str, rest: str) -> QuantloadError:
    path = re.split(r"[?#]", rest)[0].strip("/")
    kind = path.split("/")[0]
    if kind in ("datasets", "spaces", "docs", "blog", "papers", "collections") or "/" not in path:
        return ModelNotFoundError(f"{given!r} is no address of a model; give a hub id such as 'Qwen/Qwen3-0.6B'")
    owner, name, *more = path.split("/")
    ref = more[1] if len(more) > 1 and more[0] in ("tree", "blob", "resolve", "raw", "commit") else None
    default = ref in (None, "main")
    wanted = f"'{owner}/{name}'" if default else _with_revision(f"{owner}/{name}", str(ref))
    return ModelNotFoundError(f"{given!r} is an address of the hub; give the hub id instead: {wanted}")


def _with_revision(hub_id: str, revision: str) -> str:
    return f"'{hub_id}' with --revision {revision} (in Python revision={revision!r})"


def file_error(path: Path) -> QuantloadError:
    """The error for a file that was given instead of a folder."""
    if not path.is_file():
        return ModelNotFoundError(f"{str(path)!r} is neither a folder nor a file; give the folder of a model")
    try:
        with open(open_plain(path, os.O_RDONLY), "rb") as file:
            head = file.read(8)
    except OSError as problem:
        return ModelNotFoundError(f"{str(path)!r} is a file that cannot be read: {problem.strerror}")
    kind = next((kind for kind in _KINDS if path.name.lower().endswith(kind.ends)), None)
    if head.startswith(b"GGUF"):
        kind = _KINDS[0]
    folder = path.absolute().parent
    where = "" if (folder / "config.json").is_file() else ", with its config.json"
    if kind is not None:
        return UnsupportedCheckpointError(f"{str(path)!r} is a file of {kind.what}; {kind.advice}")
    beginning = kind_of_head(head) if path.suffix == ".safetensors" else None
    if beginning is not None:
        return UnsupportedCheckpointError(f"{str(path)!r} is {beginning}")
    return ModelNotFoundError(f"{str(path)!r} is a file; give the folder it lies in{where}: {str(folder)!r}")


def folder_error(root: Path, *, has_config: bool) -> QuantloadError:
    """The error for a folder in which there is no model, or a config without weights."""
    names = sorted(path.name for path in root.iterdir())
    left = unfinished(root)
    if left:
        return TruncatedShardError(
            f"{root}: its download is not finished ({some(left)}); run it again, such as 'hf download', before loading"
        )
    found = names_error(str(root), names, has_config=has_config)
    if found is not None:
        return found
    inner = _models_inside(root)
    if inner:
        return ModelNotFoundError(f"{root}: has no config.json; give the folder of the model: {some(inner)}")
    if not names and not has_config:
        return ModelNotFoundError(f"{root}: is empty, it has no config.json; give the folder or hub id of a model")
    if not has_config:
        return ModelNotFoundError(f"{root}: has no config.json; give the folder or hub id of a transformers model")
    return ModelNotFoundError(
        f"{root} has neither model.safetensors nor model.safetensors.index.json, nor other weights; give the folder "
        f"the model was saved to"
    )


def names_error(where: str, names: Collection[str], *, has_config: bool) -> QuantloadError | None:
    """What files with such names are instead of a model; None where they do not say."""
    present = set(names)
    if "adapter_config.json" in present or "adapter_model.safetensors" in present:
        return UnsupportedCheckpointError(f"{where} holds an adapter (PEFT, LoRA), not a model; {_MERGE}")
    if "model_index.json" in present:
        return UnsupportedCheckpointError(
            f"{where} is a pipeline of diffusers, several models in folders; only transformers' own are read, such as "
            f"that in text_encoder: give that folder"
        )
    if {"journal.jsonl", "files"} <= present:
        return ModelNotFoundError(f"{where} is an unfinished conversion; run quantload convert again, it goes on there")
    if {"entry.json", "checksums.crc32"} <= present:
        return ModelNotFoundError(f"{where} is an entry of a cache; give the checkpoint, and the cache with --cache")
    tensors = sorted(name for name in present if name.endswith(".safetensors"))
    if tensors and has_config:
        return ModelNotFoundError(
            f"{where} has neither model.safetensors nor model.safetensors.index.json, but {some(tensors)}; rename a "
            f"single file to model.safetensors, set transformers_weights in config.json to its name, or restore the "
            f"missing model.safetensors.index.json"
        )
    if tensors:
        return ModelNotFoundError(
            f"{where} has weights ({some(tensors)}) but no config.json; copy the config.json of its model there"
        )
    for kind in _KINDS:
        found = sorted(name for name in present if name.lower().endswith(kind.ends))
        if found:
            return UnsupportedCheckpointError(f"{where} only has {kind.what} ({some(found)}); {kind.advice}")
    return None


def unfinished(root: Path) -> list[str]:
    """Names of files that a download which did not end left in a folder, or where the hub's tools keep them."""
    places = [root, root / ".cache" / "huggingface" / "download"]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    return sorted(
        path.name for place in places if place.is_dir() for path in place.iterdir() if path.name.endswith(_UNFINISHED)
    )


def _models_inside(root: Path) -> list[str]:
    """Folders of models in a folder of a hub cache, or right below any other."""
    snapshots = root / "snapshots"
    base = snapshots if snapshots.is_dir() else root
    return sorted(str(path.parent) for path in base.glob("*/config.json"))
