"""Whole checkpoints, spoilt in one file, planned and loaded; what loads must hold the values that lie in the files.

Plain checkpoints are compared with what transformers loads of the same spoilt files, bit for bit; quantized ones with
the formats' own descriptions (`tests/end_to_end/stored_values.py`, which has nothing of quantload).
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_mutations import at, mutate_bytes, mutate_json, mutate_value, places
from fuzz_readers import CONFIG, CONFIG_NAMES, GENERATION_NAMES, GOLDEN, INDEX, ROOT, SHARD, Wrong
from quantload import load_quantized
from quantload.planning import plan_quantized
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(ROOT / "tests/end_to_end"))
from stored_values import stored_values  # type: ignore[import-not-found,unused-ignore]

GENERATION = "generation_config.json"
_DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U32",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
)


class CheckpointReader:
    """From a folder to a model."""

    names = (CONFIG, INDEX, GENERATION, ".safetensors", "quantization_config", "model.", "lm_head", "weight")
    slow = True

    def __init__(self, folder: Path) -> None:
        self._work = folder

    def corpus(self) -> list[bytes]:
        return [json.dumps([folder.name, "", "", ""]).encode() for folder in sorted(GOLDEN.glob("*_*"))]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        name = json.loads(data)[0]
        folder = GOLDEN / name
        file = rng.choices((CONFIG, SHARD, INDEX, GENERATION, "data"), (45, 35, 8, 6, 6))[0]
        if file == "data":
            return json.dumps([name, file, str(rng.randrange(1 << 30)), "data"]).encode(), f"{name}: data"
        if file == SHARD:
            changed, where = _spoil_header(rng, folder / SHARD)
        else:
            content = _index(folder) if file == INDEX else (folder / file).read_bytes()
            keys = GENERATION_NAMES if file == GENERATION else CONFIG_NAMES
            changed, where = mutate_json(rng, content, (), keys)
        return json.dumps([name, file, changed.decode("latin1"), where]).encode(), f"{name}: {file}: {where}"

    def read(self, data: bytes) -> None:
        name, file, content, where = json.loads(data)
        folder = self._work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shard = "shard.safetensors" if file == INDEX else SHARD
        for each in (CONFIG, GENERATION, SHARD):
            shutil.copy(GOLDEN / name / each, folder / (shard if each == SHARD else each))
        if file == SHARD:
            _write_header(folder / SHARD, content.encode("latin1"))
        elif file == "data":
            _flip(folder / SHARD, int(content))
        elif file:
            (folder / file).write_bytes(content.encode("latin1"))
        plan_quantized(folder, "none" if name.startswith("bf16") else "auto")
        self._load(folder, file, where)

    def _load(self, folder: Path, file: str, where: str) -> None:
        plain = folder.name.startswith("bf16") or "quantization_config" not in json.loads((folder / CONFIG).read_text())
        model: Any = load_quantized(folder, "none" if plain else "auto")
        report = model.load_report
        if report.peak_bytes > report.predicted_peak_bytes:
            raise Wrong(f"{report.peak_bytes:,} bytes of memory, {report.predicted_peak_bytes:,} were predicted")
        if plain:
            # Of an index transformers wants more than a weight_map; the weights are those of the whole folder.
            _compare_with_transformers(model, GOLDEN / folder.name if file == INDEX else folder)
        elif file != INDEX:
            dropped = tuple(report.unexpected)  # with a warning, as in transformers
            expected = {name: value for name, value in _expected(folder).items() if not _is_of(name, dropped)}
            _compare(_values(model), expected)


class ArchitectureReader:
    """The config of one of many architectures, planned: what transformers builds of it must fit the checkpoint."""

    names = (CONFIG, "weight", "bias", "quantization_config")
    slow = True

    def __init__(self, folder: Path) -> None:
        sys.path.append(str(ROOT / "tests"))
        import architectures  # type: ignore[import-not-found,unused-ignore]

        self._folders = {name: architectures.save(architectures.BY_NAME[name], folder / name) for name in ARCHITECTURES}

    def corpus(self) -> list[bytes]:
        return [json.dumps([name, (path / CONFIG).read_text()]).encode() for name, path in self._folders.items()]

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        name, content = json.loads(data)
        value = json.loads(content)
        if rng.random() < 0.5:
            integers = [path for path in places(value) if type(at(value, path)) is int]
            path = rng.choice(integers)
            at(value, path[:-1])[path[-1]] = rng.choice((10**9, 10**12, 2**31, 10**5, 10**6, 10**7, 10**18, -1, 0))
            where = ".".join(map(str, path))
        else:
            value, where = mutate_value(rng, value, CONFIG_NAMES)
        return json.dumps([name, json.dumps(value)]).encode(), f"{name}: {where}"

    def read(self, data: bytes) -> None:
        name, content = json.loads(data)
        (self._folders[name] / CONFIG).write_text(content)
        plan_quantized(self._folders[name], "none")


ARCHITECTURES = (
    "llama", "gpt2", "qwen3_moe", "gpt_oss", "t5", "gemma3", "qwen3_vl_moe", "mixtral", "bert", "deepseek_v3", "jamba",
    "nemotron_h", "jetmoe", "llama4", "mobilebert", "nomic_bert", "glm4_moe", "phi3", "granite_moe", "olmoe",
)  # fmt: skip


def _index(folder: Path) -> bytes:
    names = load_file(folder / SHARD)
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "shard.safetensors")}).encode()


def _spoil_header(rng: random.Random, path: Path) -> tuple[bytes, str]:
    """A changed header: a value or bytes of it, or tensors that stay in their places and mean something else."""
    data = path.read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if rng.random() < 0.4:
        return mutate_json(rng, text, (), ("dtype", "shape", "data_offsets"))
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    kind = rng.choice(("rename", "retag", "reshape", "swap", "swap names", "drop"))
    entry, shape = header[one], header[one]["shape"]
    if kind == "rename":
        header[mutate_bytes(rng, one.encode(), ()).decode("latin1")] = header.pop(one)
    elif kind == "retag":
        entry["dtype"] = rng.choice(_DTYPES)
    elif kind == "reshape":
        entry["shape"] = rng.choice((shape[::-1], [1, *shape], [*shape, 1], [sum(shape)], shape[1:] + shape[:1], []))
    elif kind == "drop":
        header[f"dropped.{one}"] = header.pop(one)
    else:
        same = [name for name in names if header[name]["shape"] == shape and header[name]["dtype"] == entry["dtype"]]
        other = rng.choice(same)
        header[one], header[other] = header[other], header[one]
    return json.dumps(header).encode(), f"{kind} {one}"


def _write_header(path: Path, header: bytes) -> None:
    data = path.read_bytes()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    path.write_bytes(len(header).to_bytes(8, "little") + header + rest)


def _flip(path: Path, seed: int) -> None:
    """Flip up to three bits of the tensors."""
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _compare_with_transformers(model: Any, folder: Path) -> None:
    try:
        theirs = type(model).from_pretrained(folder, dtype="auto").state_dict()
    except Exception as error:
        raise Wrong(f"loads, but not in transformers: {type(error).__name__}: {error}") from error
    _compare(model.state_dict(), theirs)


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name, expected in theirs.items():
        found = ours.get(name)
        if found is None:
            raise Wrong(f"{name} is missing")
        same = found.shape == expected.shape and torch.equal(
            found.double().nan_to_num(7), expected.double().nan_to_num(7)
        )
        if not same:
            raise Wrong(f"{name} has other values")


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model by the names that the golden checkpoints have."""
    found = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, module in model.named_modules():
        if getattr(module, "scheme", None) is None:
            continue
        if not hasattr(module, "gate_up_proj"):
            found[name] = module.dequantize()
            continue
        for weight in ("gate_up_proj", "down_proj"):
            values = module.dequantize(weight)
            if module.is_transposed:
                found[f"{name}.{weight}"] = values.transpose(1, 2)
                continue
            for expert, matrix in enumerate(values):
                parts = matrix.chunk(2) if weight == "gate_up_proj" else (matrix,)
                kinds = ("gate_proj", "up_proj") if weight == "gate_up_proj" else ("down_proj",)
                found |= {f"{name}.{expert}.{kind}": part for kind, part in zip(kinds, parts, strict=True)}
    return found


def _is_of(layer: str, tensors: tuple[str, ...]) -> bool:
    return any(tensor == layer or tensor.startswith(f"{layer}.") for tensor in tensors)


def _expected(folder: Path) -> dict[str, Tensor]:
    """What the files stand for: quantized layers by name, and the plain tensors.

    Where a header gives the same bytes a type that the description cannot count with, or that it does not know to be
    the right one (E8M0), or leaves away what says nothing (`g_idx`), they stand for what they stood for before.
    """
    try:
        scales = [tensor.dtype for name, tensor in load_file(folder / SHARD).items() if name.endswith("weight_scale")]
        values = stored_values(GOLDEN / folder.name if torch.float8_e8m0fnu in scales else folder)
    except (KeyError, NotImplementedError):
        values = stored_values(GOLDEN / folder.name)
    plain = {
        name: tensor
        for name, tensor in load_file(folder / SHARD).items()
        if name.endswith(("norm.weight", "embed_tokens.weight"))
    }
    return {**values, **plain}
