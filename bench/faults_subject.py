"""What faults are tried on: a small checkpoint in two shards, with loads and conversions whose results are known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quantload import LoadOptions, QuantloadError, convert_checkpoint, load_quantized
from safetensors.torch import save_file
from torch import Tensor

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SCHEME = "quark_mxfp4"
CHUNK_BYTES = 16 << 10
MAX_SHARD_BYTES = 100_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "tie_word_embeddings": False,
}  # fmt: skip
RIGHT, ERROR = "right", "error"


def _tensors(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden, inner, rows = 128, 256, 256
    shapes = {"model.embed_tokens.weight": (rows, hidden), "lm_head.weight": (rows, hidden)}
    for layer in range(3):
        name = f"model.layers.{layer}"
        for part, shape in {"q": (hidden, hidden), "k": (64, hidden), "v": (64, hidden), "o": (hidden, hidden)}.items():
            shapes[f"{name}.self_attn.{part}_proj.weight"] = shape
        shapes |= {f"{name}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, inner)
    tensors = {name: torch.randn(shape, generator=random).mul_(0.05).bfloat16() for name, shape in shapes.items()}
    norms = [
        f"model.layers.{layer}.{part}layernorm.weight" for layer in range(3) for part in ("input_", "post_attention_")
    ]
    return tensors | {name: torch.ones(hidden, dtype=torch.bfloat16) for name in (*norms, "model.norm.weight")}


def make_checkpoint(folder: Path, seed: int) -> Path:
    """Of another training for another seed: the same names, shapes, sizes and times."""
    folder.mkdir(parents=True)
    tensors = _tensors(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(SHARDS):
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    files = {"config.json": CONFIG, "generation_config.json": {}, "tokenizer.json": {"made with": seed}}
    files["model.safetensors.index.json"] = {"weight_map": weight_map}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for path in folder.iterdir():
        os.utime(path, (1000, 1000))
    return folder


def load(folder: Path, cache: Path | None = None) -> Any:
    """A model, read in many small pieces."""
    options = LoadOptions(chunk_bytes=CHUNK_BYTES, workers=2, cache=cache, stats=False, page_cache="keep")
    return load_quantized(folder, SCHEME, device="cpu", options=options)


def convert(folder: Path, out: Path) -> None:
    """A quantized checkpoint of several shards."""
    options = LoadOptions(chunk_bytes=CHUNK_BYTES, workers=2, stats=False, page_cache="keep")
    convert_checkpoint(folder, out, SCHEME, options=options, max_shard_bytes=MAX_SHARD_BYTES)


def digest_of_model(model: Any) -> str:
    """Of every byte of every tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_LOOKING = [0]


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Meanwhile it is this script that asks the disk, which answers it."""
    _LOOKING[0] += 1
    try:
        yield
    finally:
        _LOOKING[0] -= 1


def is_looking() -> bool:
    """Whether a call on the disk is of this script's own."""
    return _LOOKING[0] > 0


def digest_of_folder(folder: Path) -> str:
    """Of every byte of every file, by name."""
    with looking():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
        return digest.hexdigest()


def entries(cache: Path) -> list[Path]:
    """What looks like a finished entry of a cache."""
    return [path for path in cache.iterdir() if len(path.name) == 64] if cache.is_dir() else []


@dataclass
class Subject:
    """A checkpoint, and another version of it, in a folder of their own."""

    root: Path
    old: Path = field(init=False)
    new: Path = field(init=False)

    def __post_init__(self) -> None:
        self.old = make_checkpoint(self.root / "old", 1)
        self.new = make_checkpoint(self.root / "new", 2)

    def measure(self) -> Expected:
        """What uninterrupted runs give."""
        place = self.root / "expected"
        model = load(self.old, place / "cache")
        assert model.load_report.cache == "written", model.load_report.cache
        convert(self.old, place / "out")
        (entry,) = entries(place / "cache")
        weights = hashlib.sha256((entry / "model.safetensors").read_bytes()).hexdigest()
        expected = Expected(digest_of_model(model), digest_of_folder(place / "out"), weights)
        shutil.rmtree(place)
        return expected


@dataclass(frozen=True)
class Expected:
    """Digests of the model, of the converted folder, and of the weights of the entry of a cache."""

    model: str
    folder: str
    entry: str

    def leftovers(self, cache: Path, out: Path) -> list[str]:
        """What is there under the name of something finished, and is not what it should be."""
        found = []
        for entry in entries(cache):
            path = entry / "model.safetensors"
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.entry:
                found.append(f"the entry {entry.name[:8]} is not what it should be")
        if os.path.lexists(out) and digest_of_folder(out) != self.folder:
            found.append("the converted folder is not what it should be")
        return found


@dataclass
class Row:
    """One line of the table: how often something was tried, what came of it, and what must not have."""

    group: str
    what: str
    way: str = ""
    tries: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str, wrong: Collection[str] = ()) -> None:
        """One more try."""
        self.tries += 1
        self.outcomes[outcome] += 1
        self.wrong += wrong

    def to_json(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "group": self.group, "what": self.what, "way": self.way, "tries": self.tries,
            "outcomes": dict(self.outcomes), "wrong": len(self.wrong), "examples": self.wrong[:5],
        }  # fmt: skip


def outcome_of(do: Callable[[], str], right: Collection[str]) -> tuple[str, list[str]]:
    """`right` or `error`; what is neither the right digest nor a `QuantloadError` is wrong, and said."""
    try:
        digest = do()
    except QuantloadError:
        return ERROR, []
    except Exception as error:
        return type(error).__name__, [f"{type(error).__name__}: {error}"[:300]]
    return (RIGHT, []) if digest in right else ("other bytes", ["other bytes than the right ones"])
