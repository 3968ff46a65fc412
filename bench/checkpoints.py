"""Make the synthetic BF16 checkpoints that `bench/load.py` loads.

Four folders a transformers class can open: a dense model in five shards, a mixture of experts stored one tensor an
expert, a model with one tensor of 2 GB, and a model of 2,000 tiny tensors. The weights are seeded noise with another
scale for every tensor. They are written block by block, so that making 3 GB needs 200 MB of memory.

    python bench/checkpoints.py --scale 0.05
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECIPE_VERSION = 2
WORK_FOLDER = Path(__file__).resolve().parent / "work"
NOISE_ELEMENTS = (1 << 24) + 4099  # no multiple of any row length, so rows and experts differ
WRITE_ELEMENTS = 1 << 22
DISK_MARGIN = 2 << 30
HEAD_DIM = 128

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: its `config.json`, its tensors in the order they are stored, and how many shards hold them."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Shape]
    shards: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(2 * math.prod(shape) for shape in self.tensors.values())


def _scaled(width: int, scale: float, multiple: int = 256) -> int:
    return max(multiple, round(width * math.sqrt(scale) / multiple) * multiple)


def _layers(count: int, scale: float) -> int:
    """A scale under 0.01 makes the one-layer checkpoint that a process warms up on."""
    return count if scale >= 0.01 else 1


def _config(architecture: str, model_type: str, hidden: int, vocab: int, layers: int, **more: Any) -> dict[str, Any]:
    heads = max(2, hidden // HEAD_DIM)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "head_dim": hidden // heads if hidden < 2 * HEAD_DIM else HEAD_DIM,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


def _attention(prefix: str, config: dict[str, Any]) -> dict[str, Shape]:
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = head * config["num_attention_heads"]
    kv_rows = head * config["num_key_value_heads"]
    return {
        f"{prefix}.q_proj.weight": (rows, hidden),
        f"{prefix}.k_proj.weight": (kv_rows, hidden),
        f"{prefix}.v_proj.weight": (kv_rows, hidden),
        f"{prefix}.o_proj.weight": (hidden, rows),
    }


def _gated_mlp(prefix: str, hidden: int, intermediate: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def _decoder(config: dict[str, Any], layer: Callable[[str], dict[str, Shape]]) -> dict[str, Shape]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        tensors.update(layer(prefix))
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def dense(scale: float = 1.0) -> Recipe:
    """Llama, 3.1 GB at scale 1: six layers of the 8B model's shapes, in five shards."""
    intermediate = _scaled(14336, scale)
    config = _config("LlamaForCausalLM", "llama", _scaled(4096, scale), _scaled(32000, scale), _layers(6, scale))
    config["intermediate_size"] = intermediate

    def layer(prefix: str) -> dict[str, Shape]:
        mlp = _gated_mlp(f"{prefix}.mlp", config["hidden_size"], intermediate)
        return {**_attention(f"{prefix}.self_attn", config), **mlp}

    return Recipe("dense", config, _decoder(config, layer), 5)


def moe(scale: float = 1.0) -> Recipe:
    """Qwen3-MoE, 3.1 GB at scale 1: four layers of 64 experts with the 30B-A3B model's shapes, one tensor an expert."""
    experts, intermediate = 64, _scaled(768, scale, 128)
    config = _config("Qwen3MoeForCausalLM", "qwen3_moe", _scaled(2048, scale), _scaled(65536, scale), _layers(4, scale))
    config |= {
        "intermediate_size": intermediate,
        "moe_intermediate_size": intermediate,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }

    def layer(prefix: str) -> dict[str, Shape]:
        hidden, head = config["hidden_size"], config["head_dim"]
        tensors = _attention(f"{prefix}.self_attn", config)
        tensors |= {f"{prefix}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
        tensors[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            tensors |= _gated_mlp(f"{prefix}.mlp.experts.{expert}", hidden, intermediate)
        return tensors

    return Recipe("moe", config, _decoder(config, layer), 4)


def huge(scale: float = 1.0) -> Recipe:
    """Phi-3, 3.3 GB at scale 1: one layer whose fused gate and up projection is a single tensor of 2 GiB."""
    hidden, intermediate = _scaled(4096, scale), _scaled(131072, scale)
    config = _config("Phi3ForCausalLM", "phi3", hidden, _scaled(4096, scale), 1)
    config |= {"intermediate_size": intermediate, "original_max_position_embeddings": 4096}
    rows = config["head_dim"] * config["num_attention_heads"]
    kv_rows = config["head_dim"] * config["num_key_value_heads"]

    def layer(prefix: str) -> dict[str, Shape]:
        return {
            f"{prefix}.self_attn.qkv_proj.weight": (rows + 2 * kv_rows, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, rows),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }

    return Recipe("huge", config, _decoder(config, layer), 1)


def tiny(scale: float = 1.0) -> Recipe:
    """Llama, 74 MB: 222 layers of width 128, which makes 2,001 tensors, whatever the scale."""
    config = _config("LlamaForCausalLM", "llama", 128, 1024, _layers(222, scale))
    config["intermediate_size"] = 256

    def layer(prefix: str) -> dict[str, Shape]:
        return {**_attention(f"{prefix}.self_attn", config), **_gated_mlp(f"{prefix}.mlp", 128, 256)}

    return Recipe("tiny", config, _decoder(config, layer), 1)


RECIPES: dict[str, Callable[[float], Recipe]] = {"dense": dense, "moe": moe, "huge": huge, "tiny": tiny}


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """BF16 bit patterns of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _noise(seed: int) -> NDArray[np.uint16]:
    values = np.random.default_rng(seed).standard_normal(NOISE_ELEMENTS, dtype=np.float32)
    # A power of two is applied later by adding to the exponent field: nothing may be zero or near the subnormals.
    small = np.abs(values) < 2.0**-20
    values[small] = 2.0**-20
    return bf16_bits(values)


def _blocks(name: str, shape: Shape, noise: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """The bits of one tensor, at most `WRITE_ELEMENTS` at a time."""
    left = math.prod(shape)
    if len(shape) == 1:
        yield np.full(left, 0x3F80, dtype=np.uint16)
        return
    key = zlib.crc32(name.encode())
    position = key % len(noise)
    # Standard deviation about 1/sqrt(K), as in a trained model, times 1/2, 1 or 2 depending on the name.
    shift = np.uint16((round(math.log2(shape[-1]) / 2) + key % 3 - 1) << 7)
    while left:
        count = min(left, WRITE_ELEMENTS, len(noise) - position)
        yield noise[position : position + count] - shift
        position = (position + count) % len(noise)
        left -= count


def _write_shard(path: Path, tensors: dict[str, Shape], noise: NDArray[np.uint16]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for block in _blocks(name, shape, noise):
                file.write(block.data)
        file.flush()
        os.fsync(file.fileno())  # a dirty page cannot be dropped from the page cache for a cold run


def _split(recipe: Recipe) -> list[dict[str, Shape]]:
    """Tensors in stored order, cut into shards of about the same size."""
    shards: list[dict[str, Shape]] = [{} for _ in range(recipe.shards)]
    written = 0
    for name, shape in recipe.tensors.items():
        shards[min(recipe.shards - 1, written * recipe.shards // recipe.tensor_bytes)][name] = shape
        written += 2 * math.prod(shape)
    return [shard for shard in shards if shard]


def _write(recipe: Recipe, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    noise = _noise(seed)
    shards = _split(recipe)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file_name, tensors, noise)
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": recipe.tensor_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(recipe.config, indent=2))


def make(name: str, scale: float = 1.0, folder: Path = WORK_FOLDER, seed: int = 0) -> Path:
    """Folder of the checkpoint `name` at `scale`, made now unless an earlier run left it there.

    Raises `SystemExit` when the disk has too little room: it says how much is needed.
    """
    recipe = RECIPES[name](scale)
    target = folder / f"{name}-{scale:g}"
    stamp = target / "recipe.json"
    wanted = json.dumps({"version": RECIPE_VERSION, "seed": seed, "config": recipe.config}, sort_keys=True)
    if stamp.is_file() and stamp.read_text() == wanted:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    free = shutil.disk_usage(folder).free
    if free < recipe.tensor_bytes + DISK_MARGIN:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free; checkpoint {name} needs {recipe.tensor_bytes / 1e9:.1f} GB and"
            f" {DISK_MARGIN / 1e9:.1f} GB to spare. Free some, or give another --work folder or a smaller --scale."
        )
    _write(recipe, target, seed)
    stamp.write_text(wanted)  # last: a folder without it was not finished
    return target


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in name order."""
    return sorted(folder.glob("*.safetensors"))


def tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint folder, from the file headers."""
    shapes: dict[str, Shape] = {}
    for path in shards_of(folder):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def main() -> None:
    """Make the checkpoints named on the command line, all four by default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; default all")
    parser.add_argument("--scale", type=float, default=1.0, help="size relative to the full checkpoints (default 1)")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="where they go (default bench/work)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(RECIPES))
    if unknown:
        parser.error(f"no checkpoint is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        folder = make(name, options.scale, options.work)
        files = shards_of(folder)
        size = sum(path.stat().st_size for path in files)
        print(f"{folder}: {size / 1e9:.3f} GB in {len(files)} files, {len(tensor_shapes(folder))} tensors")


if __name__ == "__main__":
    main()
