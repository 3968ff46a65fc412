"""Make the synthetic BF16 checkpoints that the benchmarks load.

Folders a transformers class can open, as `recipes.py` describes them. The weights are seeded noise with another scale
for every tensor. They are written block by block, so that making them needs 200 MB of memory whatever their size.

    python bench/checkpoints.py --scale 0.05
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recipes import RECIPES, Recipe, Shape

RECIPE_VERSION = 2
WORK_FOLDER = Path(__file__).resolve().parent / "work"
NOISE_ELEMENTS = (1 << 24) + 4099  # no multiple of any row length, so rows and experts differ
WRITE_ELEMENTS = 1 << 22
DISK_MARGIN = 2 << 30


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


def _header(tensors: dict[str, Shape]) -> tuple[bytes, int]:
    """A safetensors header, its length in front, and the bytes of the tensors it describes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _write_shard(path: Path, tensors: dict[str, Shape], noise: NDArray[np.uint16]) -> None:
    with path.open("wb") as file:
        file.write(_header(tensors)[0])
        for name, shape in tensors.items():
            for block in _blocks(name, shape, noise):
                file.write(block.data)
        file.flush()
        os.fsync(file.fileno())  # a dirty page cannot be dropped from the page cache for a cold run


def _write_hollow_shard(path: Path, tensors: dict[str, Shape]) -> None:
    head, size = _header(tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)


def _split(recipe: Recipe) -> list[dict[str, Shape]]:
    """Tensors in stored order, cut into shards of about the same size."""
    shards: list[dict[str, Shape]] = [{} for _ in range(recipe.shards)]
    written, total = 0, recipe.tensor_bytes
    for name, shape in recipe.tensors.items():
        shards[min(recipe.shards - 1, written * recipe.shards // total)][name] = shape
        written += 2 * math.prod(shape)
    return [shard for shard in shards if shard]


def _write(recipe: Recipe, folder: Path, seed: int, hollow: bool, drop: bool) -> None:
    folder.mkdir(parents=True)
    noise = np.zeros(0, dtype=np.uint16) if hollow else _noise(seed)
    shards = _split(recipe)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        if hollow:
            _write_hollow_shard(folder / file_name, tensors)
        else:
            _write_shard(folder / file_name, tensors, noise)
        if drop:
            drop_files([folder / file_name])
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": recipe.tensor_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(recipe.config, indent=2))


def drop_files(files: list[Path]) -> None:
    """Drop the files' clean pages from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def missing_bytes(recipe: Recipe, folder: Path) -> int:
    """Bytes the disk of `folder`, which exists, lacks for the checkpoint and a margin; 0 where there is room."""
    return max(0, recipe.tensor_bytes + DISK_MARGIN - shutil.disk_usage(folder).free)


def make(name: str, scale: float = 1.0, folder: Path = WORK_FOLDER, seed: int = 0) -> Path:
    """Folder of the checkpoint `name` at `scale`, made now unless an earlier run left it there.

    Raises `SystemExit` when the disk has too little room: it says how much is needed.
    """
    return make_recipe(RECIPES[name](scale), folder / f"{name}-{scale:g}", seed)


def make_recipe(recipe: Recipe, target: Path, seed: int = 0, hollow: bool = False, drop: bool = False) -> Path:
    """The checkpoint a recipe describes in the folder `target`, made now unless it is there already.

    `hollow` writes headers and no weights: files of the full size that take no room. `drop` leaves nothing of it in
    the page cache. Raises `SystemExit` when the disk has too little room: it says how much is needed.
    """
    stamp = target / "recipe.json"
    wanted = json.dumps({"version": RECIPE_VERSION, "seed": seed, "config": recipe.config}, sort_keys=True)
    if stamp.is_file() and stamp.read_text() == wanted:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    lacking = 0 if hollow else missing_bytes(recipe, target.parent)
    if lacking:
        free = shutil.disk_usage(target.parent).free
        raise SystemExit(
            f"{target.parent} has {free / 1e9:.1f} GB free; checkpoint {recipe.name} needs"
            f" {recipe.tensor_bytes / 1e9:.1f} GB and {DISK_MARGIN / 1e9:.1f} GB to spare. Free some, or give another"
            " folder or a smaller size."
        )
    _write(recipe, target, seed, hollow, drop)
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
    """Make the checkpoints named on the command line, all of them by default."""
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
