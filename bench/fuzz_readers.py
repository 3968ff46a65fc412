"""What is fuzzed: each reader of a checkpoint's files with inputs to begin from, and what must be true of the result.

`read` raises a `QuantloadError` for what is refused; anything else it raises is a fault. `Wrong`: it was read, and
differs from what another reader makes of the same bytes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import safetensors
import torch
from fuzz_mutations import mutate_bytes, mutate_json, places
from quantload.checkpoint import FileSource, read_header, read_index
from quantload.checkpoint.headers import DTYPES, TensorEntry
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.weight_map import parse_weight_map

ROOT = Path(__file__).resolve().parents[1]
GOLDEN, STORED, DEMO = ROOT / "tests/data/golden", ROOT / "tests/data/stored", ROOT / "loader/demo_model"
SHARD, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
_SPARE = 1 << 16


class Wrong(Exception):
    """Something was read that is not what the file says."""


class Reader(Protocol):
    """A reader of one kind of file."""

    names: tuple[str, ...]
    """What a message names: a file, or what is in it."""

    def corpus(self) -> list[bytes]: ...

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]: ...

    def read(self, data: bytes) -> None: ...


def small_shard(path: Path) -> bytes:
    """The header of a real shard with tensors of at most some kilobytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
    end = 0
    for entry in header.values():
        begin, stop = entry["data_offsets"]
        size = stop - begin
        if size > 64:
            width = size // max(1, _product(entry["shape"]))
            entry["shape"] = [0, *entry["shape"][1:]] if len(entry["shape"]) > 1 or not width else [64 // width]
            size = width * _product(entry["shape"])
        entry["data_offsets"] = [end, end + size]
        end += size
    text = json.dumps({**metadata, **header}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


class HeaderReader:
    """Headers of shards, compared with safetensors' own reading."""

    names = (SHARD,)

    def __init__(self, folder: Path) -> None:
        self._path = folder / SHARD

    def corpus(self) -> list[bytes]:
        made = [small_shard(path) for path in sorted(GOLDEN.glob(f"*/{SHARD}"))]
        return [shard for shard in made if len(shard) < _SPARE]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        length = int.from_bytes(data[:8], "little")
        if rng.random() < 0.5 or not 0 < length <= len(data) - 8:
            return mutate_bytes(rng, data, others, within=8 + min(length, _SPARE)), "bytes"
        header, where = mutate_json(
            rng, data[8 : 8 + length], others, ("dtype", "shape", "data_offsets", "__metadata__")
        )
        return len(header).to_bytes(8, "little") + header + data[8 + length :], where

    def read(self, data: bytes) -> None:
        self._path.write_bytes(data)
        with FileSource(self._path.parent, page_cache="keep") as source:
            header = read_header(source, SHARD)
        try:
            theirs: dict[str, Any] = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
        except Exception as error:
            raise Wrong(f"accepted, but safetensors refuses it: {error}") from error
        if set(theirs) != set(header.tensors):
            raise Wrong("not the names that safetensors finds")
        for name, entry in header.tensors.items():
            their = theirs[name]
            shape = list(entry.shape)
            if entry.dtype is DTYPES["F4"]:
                shape[-1] *= 2
            if DTYPES[their["dtype"]] is not entry.dtype or list(their["shape"]) != shape:
                raise Wrong(f"{name}: {entry}, safetensors has {their['dtype']} {their['shape']}")
            if bytes(their["data"]) != data[entry.offset : entry.offset + entry.nbytes]:
                raise Wrong(f"{name}: other bytes than safetensors'")


class IndexReader:
    """The index of shards, compared with plain JSON."""

    names = (INDEX,)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def corpus(self) -> list[bytes]:
        names = [list(read_index(resolve(folder)).tensors) for folder in sorted(GOLDEN.glob("*_*"))]
        maps = [{name: f"{len(name) % 3}.safetensors" for name in each} for each in names]
        made = [json.dumps({"metadata": {"total_size": 1}, "weight_map": each}).encode() for each in maps]
        return [(DEMO / INDEX).read_bytes(), *made]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        return mutate_json(rng, data, others, ("weight_map", "metadata", "total_size", "../x", "a" * 5000))

    def read(self, data: bytes) -> None:
        found = parse_weight_map(data, INDEX)
        try:
            plain = json.loads(data)["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise Wrong(f"accepted, but it is not JSON with a weight_map: {error}") from error
        if found != plain:
            raise Wrong("another weight_map than plain JSON has")


def without_quantization(value: Any) -> Any:
    """A config without what it says of quantization, which is moved to one place when it is read."""
    if isinstance(value, list):
        return [without_quantization(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    moved = ("quantization_config", "compression_config")
    return {key: without_quantization(inner) for key, inner in value.items() if key not in moved}


class ConfigReader:
    """config.json up to the class and config of the model, compared with plain JSON."""

    names = (CONFIG,)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors = read_index(resolve(GOLDEN / "bf16_llama")).tensors

    def corpus(self) -> list[bytes]:
        return [(folder / CONFIG).read_bytes() for folder in (DEMO, *sorted(GOLDEN.glob("*_*")))]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        return mutate_json(rng, data, others, CONFIG_NAMES)

    def read(self, data: bytes) -> None:
        (self._folder / CONFIG).write_bytes(data)
        checkpoint = resolve(self._folder)
        said = checkpoint.config()
        if repr(without_quantization(said)) != repr(without_quantization(json.loads(data))):
            raise Wrong("another config than plain JSON has")
        from quantload.model.skeleton import find_model  # transformers takes seconds to import: not for every reader

        find_model(checkpoint, False, self._tensors)


class QuantizationConfigReader:
    """`quantization_config` and the headers it speaks of, up to how each weight is stored."""

    names = ("quantization_config", CONFIG, "model.", "lm_head")

    def __init__(self, folder: Path) -> None:
        self._cases = [self._case(each) for each in sorted(STORED.glob("*_*"))]

    def _case(self, folder: Path) -> tuple[dict[str, Any], dict[str, TensorEntry], dict[str, torch.Tensor]]:
        from safetensors.torch import load_file

        tensors = load_file(folder / SHARD)
        return json.loads((folder / CONFIG).read_text()), read_index(resolve(folder)).tensors, tensors

    def corpus(self) -> list[bytes]:
        return [json.dumps([number, config]).encode() for number, (config, *_) in enumerate(self._cases)]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        number, config = json.loads(data)
        changed, where = mutate_json(rng, json.dumps(config).encode(), others, self._names(config, rng))
        try:
            value = json.loads(changed)
        except (ValueError, RecursionError):
            value = config
        return json.dumps(
            [number, value if isinstance(value, dict) else {"quantization_config": value}]
        ).encode(), where

    def _names(self, config: dict[str, Any], rng: random.Random) -> list[str]:
        other = rng.choice(self._cases)[0]
        return [str(path[-1]) for each in (config, other) for path in places(each)] or ["x"]

    def read(self, data: bytes) -> None:
        number, config = json.loads(data)
        _, entries, tensors = self._cases[number]
        if not isinstance(config.get("quantization_config"), (dict, type(None))):
            return  # config.json is refused before
        from quantload.schemes.stored.read import read_stored

        stored = read_stored(config, entries, lambda entry: tensors[entry.name])
        taken = {entry.name for weight in stored.weights.values() for entry in weight.entries()}
        every = taken | set(stored.plain) | set(stored.unused)
        if every != set(entries):
            raise Wrong(f"neither read nor refused: {sorted(set(entries) ^ every)[:3]}")


class GenerationConfigReader:
    """generation_config.json; what is read is what transformers reads."""

    names = ("generation_config.json",)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.copy(DEMO / CONFIG, folder)

    def corpus(self) -> list[bytes]:
        rich = {"eos_token_id": [1, 2], "suppress_tokens": [1, 2], "max_new_tokens": 5, "forced_bos_token_id": 1,
                "begin_suppress_tokens": [1], "sequence_bias": [[[1, 2], -1.0]], "bad_words_ids": [[1]],
                "cache_implementation": "static", "cache_config": {"a": 1}, "stop_strings": ["a"],
                "compile_config": {"mode": "default"}, "watermarking_config": {"greenlist_ratio": 0.5}}  # fmt: skip
        return [(DEMO / self.names[0]).read_bytes(), json.dumps(rich).encode()]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        return mutate_json(rng, data, others, GENERATION_NAMES)

    def read(self, data: bytes) -> None:
        (self._folder / self.names[0]).write_bytes(data)
        from quantload.model.transformers_api import adopt_generation_config

        model: Any = SimpleNamespace(can_generate=lambda: True)
        adopt_generation_config(model, self._folder)


CONFIG_NAMES = (
    "model_type", "architectures", "num_hidden_layers", "hidden_size", "vocab_size", "num_labels", "id2label",
    "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype", "text_config",
    "auto_map", "vision_config", "attn_implementation", "transformers_weights", "quantization_config",
    "tie_word_embeddings", "num_attention_heads", "head_dim", "num_experts", "sliding_window", "pad_token_id",
    "eos_token_id", "hidden_act", "is_encoder_decoder", "pruned_heads", "max_position_embeddings",
    "intermediate_size", "sub_configs", "_name_or_path", "base_model_tp_plan",
)  # fmt: skip
GENERATION_NAMES = (
    "max_length", "max_new_tokens", "num_beams", "temperature", "eos_token_id", "pad_token_id", "cache_implementation",
    "cache_config", "compile_config", "watermarking_config", "stop_strings", "sequence_bias", "bad_words_ids",
    "custom_generate", "assistant_early_exit", "transformers_version", "_from_model_config", "return_dict_in_generate",
    "prompt_lookup_num_tokens",
)  # fmt: skip

READERS: dict[str, type[Any]] = {
    "header": HeaderReader,
    "index": IndexReader,
    "config": ConfigReader,
    "quantization_config": QuantizationConfigReader,
    "generation_config": GenerationConfigReader,
}
