"""Which bytes are those of which tool: every golden output in tests/data beside what the torch reference makes now.

python bench/all.py --tables-only       # puts the tables of this module into docs/parity.md

Other kernels make the bytes of the torch reference, and loads those of the kernels: that is what the tests hold.
Codes are compared one by one. -0 counts as 0, which is said where it was needed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.kernels.formats import FORMATS
from quantload.kernels.reference.mx import unpack_fp6
from quantload.kernels.reference.nvfp4 import Nvfp4Codec
from quantload.kernels.registry import kernel_set
from quantload.schemes.stored.read import read_stored
from quantload.schemes.stored.weights import StoredCheckpoint
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
TOOLS = json.loads((DATA / "tools.json").read_text())
SETS = ("gauss", "ties", "zeros")
KINDS = {
    "fp4|even": ("quark_mxfp4", "mxfp4"),
    "e2m3|even": ("mxfp6_e2m3", "mxfp6_e2m3"),
    "e2m3p|even": ("mxfp6_e2m3", "mxfp6_e2m3"),
    "e3m2|even": ("mxfp6_e3m2", "mxfp6_e3m2"),
    "e3m2p|even": ("mxfp6_e3m2", "mxfp6_e3m2"),
    "e4m3|rceil": ("mxfp8", "mxfp8"),
    "fp8|tensor": ("fp8_per_tensor", "fp8_tensor"),
    "fp8|ptpc": ("fp8_per_channel", "fp8_channel"),
    "fp8|block128": ("fp8_per_block", "fp8_block"),
    "int8|experts_int8_bf16": ("int8_per_channel", "int8_channel"),
    "int4|channel7": ("quark_int4fp8_moe", "int4fp8_channel"),
}
"""What the vectors of a kind are made with: element and mode, scheme, format."""
EXPORTS = (
    ("bf16_llama", "quark_llama_mxfp4", "quark_mxfp4", "mxfp4"),
    ("bf16_qwen3moe", "quark_qwen3moe_mxfp4", "quark_mxfp4", "mxfp4"),
    ("bf16_llama", "ct_llama_mxfp4", "quark_mxfp4", "mxfp4"),
    ("bf16_llama", "quark_llama_mxfp6_e2m3", "mxfp6_e2m3", "mxfp6_e2m3"),
    ("bf16_llama", "quark_llama_mxfp6_e3m2", "mxfp6_e3m2", "mxfp6_e3m2"),
)
"""Checkpoints that a tool wrote of one of ours: the original, the export, scheme and format."""
REASONS = {
    ("int8_per_channel", "vLLM"): "vLLM rounds the scale to BF16; no code is further than 1 away",
    ("quark_int4fp8_moe", "SGLang"): "rows of zeros, which SGLang divides by zero",
    ("int4_per_group", "AutoAWQ"): "AutoAWQ divides by the scale before it is FP16, so that some ties go the other way",
}
"""Why bytes differ, where some do."""
NEARLY = {"quark_llama_int4_fp8"}
"""Checkpoints whose values are read to the last bit but one; tests/schemes/test_stored_golden.py holds all of this."""


@dataclass
class Comparison:
    """Codes and scales of one scheme beside those of one tool."""

    scheme: str
    tool: str
    version: str
    source: str
    codes: int = 0
    codes_apart: int = 0
    negative_zeros: int = 0
    scales: int = 0
    scales_apart: int = 0
    scales_of_zeros: int = 0
    furthest: int = 0
    """The largest distance between two codes, as numbers."""

    def add(self, ours: np.ndarray, theirs: np.ndarray, minus_zero: int | None) -> None:
        """Codes, one a number; `minus_zero` is the code of -0, None for integers."""
        assert ours.shape == theirs.shape, (self.scheme, self.tool, ours.shape, theirs.shape)
        first, second = ours.astype(np.int64), theirs.astype(np.int64)
        if minus_zero is not None:
            raw = first != second
            first, second = (np.where(each == minus_zero, 0, each) for each in (first, second))
            self.negative_zeros += int((raw & (first == second)).sum())
        self.codes += ours.size
        self.codes_apart += int((first != second).sum())
        self.furthest = max(self.furthest, int(np.abs(first - second).max()))

    def add_scales(self, ours: np.ndarray, theirs: np.ndarray, of_zeros: np.ndarray) -> None:
        """Scales as bytes or numbers; `of_zeros` says which belong to weights that are all zero."""
        apart = ours != theirs
        self.scales += ours.size
        self.scales_apart += int((apart & ~of_zeros).sum())
        self.scales_of_zeros += int((apart & of_zeros).sum())

    @property
    def row(self) -> tuple[str, ...]:
        codes = _words(self.codes_apart, self.codes, "but for the sign of 0" if self.negative_zeros else "")
        scales = _words(self.scales_apart, self.scales, "but where all is 0" if self.scales_of_zeros else "")
        why = REASONS.get((self.scheme, self.tool), "")
        if self.tool == "AMD Quark" and self.negative_zeros:
            why = "Quark writes no -0, and scale byte 1 where a block is all 0"
        return f"`{self.scheme}`", self.tool, self.version, self.source, codes, scales, why


def _words(apart: int, of: int, but: str) -> str:
    same = f"identical {but}".strip()
    return same if not apart else f"{apart:,} of {of:,} differ"


def _comparison(scheme: str, tool: Sequence[str], source: str) -> Comparison:
    name, version = tool
    return Comparison(scheme, name, version, source)


def comparisons() -> list[Comparison]:
    """Of every golden output, in the order of the schemes."""
    found = [*_vectors(), *_nvfp4(), *_exports(), _awq()]
    order = [scheme for scheme, _ in KINDS.values()]
    return sorted(found, key=lambda each: order.index(each.scheme) if each.scheme in order else len(order))


def quantized(fmt: str, source: Tensor) -> tuple[Tensor, ...]:
    """The tensors that the torch reference makes of a weight [N, K]."""
    tensors = tuple(torch.zeros(each.shape(*source.shape)).to(each.dtype) for each in FORMATS[fmt].tensors)
    assert kernel_set(fmt, "cpu", {"quantize": "torch"}).quantize(source, tensors) == 0
    return tensors


def elements(fmt: str, stored: Tensor) -> np.ndarray:
    """One code a number, of bytes that may hold several."""
    found = stored.view(torch.uint8)
    if FORMATS[fmt].code_bits == 6:
        found = unpack_fp6(found)
    elif FORMATS[fmt].code_bits == 4:
        found = torch.stack((found & 15, found >> 4), -1).flatten(-2)
    as_numbers: np.ndarray = found.numpy()
    return as_numbers


def _minus_zero(fmt: str) -> int | None:
    return None if "int" in fmt else 1 << (FORMATS[fmt].code_bits - 1)


def _bits(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor.float()).numpy()
    return found


def _all_zero(source: Tensor, scales: np.ndarray) -> np.ndarray:
    """Which scales [n, k] belong to weights of [N, K] that are all zero."""
    rows, columns = source.shape[0] // scales.shape[0], source.shape[1] // scales.shape[1]
    blocks = source.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    found: np.ndarray = (blocks == 0).all(-1).all(1).numpy()
    return found


def _vectors() -> Iterator[Comparison]:
    vectors: dict[str, np.ndarray] = {}
    for name in ("vectors", "vectors_mx", "vectors_int4"):
        with np.load(DATA / f"{name}.npz") as stored:
            vectors.update(stored)
    found: dict[tuple[str, str], Comparison] = {}
    for key in vectors:
        name, _, rest = key.partition("|")
        if name not in SETS or not rest.endswith("|c"):
            continue
        tool, _, kind = rest.removesuffix("|c").partition(":")
        if kind == "int4|pack":  # the same codes once more
            continue
        scheme, fmt = KINDS[kind]
        made = found.setdefault((scheme, tool), _comparison(scheme, TOOLS["vectors"][tool], "vectors"))
        source = torch.from_numpy(vectors[f"{name}|in"].astype(np.int16)).view(torch.bfloat16)
        codes, scales = quantized(fmt, source)
        theirs = torch.from_numpy(vectors[key].copy())
        if kind == "int4|channel7":
            ours, scales = elements(fmt, codes).astype(np.int64) - 8, scales[:, :1]
            made.add(ours, theirs.numpy(), None)
        elif kind.startswith("int8"):
            made.add(codes.numpy(), theirs.numpy(), None)
        else:  # most tools have one code to a byte
            packed = kind.startswith("fp4") or kind.partition("|")[0].endswith("p")
            made.add(
                elements(fmt, codes), elements(fmt, theirs) if packed else theirs.view(torch.uint8).numpy(),
                _minus_zero(fmt),
            )  # fmt: skip
        ours_scales, want = _bits(scales), vectors[f"{key[:-1]}s"]
        made.add_scales(ours_scales, want.reshape(ours_scales.shape), _all_zero(source, ours_scales))
    return iter(found.values())


def _nvfp4() -> Iterator[Comparison]:
    made = _comparison("nvfp4", TOOLS["nvfp4"], "vectors")
    with np.load(DATA / "vectors_nvfp4.npz") as stored:
        vectors = dict(stored)
    for name in (key.removesuffix("|in") for key in vectors if key.endswith("|in")):
        source = torch.from_numpy(vectors[f"{name}|in"]).view(torch.bfloat16)
        codes, scale, scale_2 = quantized("nvfp4", source)
        theirs = torch.from_numpy(vectors[f"{name}|codes"])
        made.add(elements("nvfp4", codes), elements("nvfp4", theirs), None)
        made.add_scales(_bits(scale), vectors[f"{name}|scales"], np.zeros(scale.shape, bool))
        multiplier = Nvfp4Codec().multiplier(scale_2).numpy().reshape(1, 1)
        made.add_scales(multiplier, vectors[f"{name}|global"].reshape(1, 1), np.zeros((1, 1), bool))
    yield made


def _exports() -> Iterator[Comparison]:
    for original, export, scheme, fmt in EXPORTS:
        made = _comparison(scheme, TOOLS["checkpoints"][export.partition("_")[0]], f"checkpoint `{export}`")
        weights, theirs = (load_file(DATA / "golden" / name / "model.safetensors") for name in (original, export))
        for key in (key for key in theirs if key.endswith(".weight_scale")):
            name = key.removesuffix("_scale")
            source = weights[name]
            codes, scales = quantized(fmt, source)
            stored = theirs[f"{name}_packed"] if f"{name}_packed" in theirs else theirs[name]
            made.add(elements(fmt, codes), elements(fmt, stored), _minus_zero(fmt))
            made.add_scales(_bits(scales), _bits(theirs[key]), _all_zero(source, _bits(scales)))
        yield made


def _awq() -> Comparison:
    name = "native_llama_awq"
    made = _comparison("int4_per_group", TOOLS["checkpoints"][name], f"checkpoint `{name}`")
    weights, theirs = (load_file(DATA / "golden" / each / "model.safetensors") for each in ("bf16_llama", name))
    for name in (key.removesuffix(".qweight") for key in theirs if key.endswith(".qweight")):
        codes, scales = quantized("int4_group128_f16", weights[f"{name}.weight"])
        zeros, stored = (_of_awq(theirs[f"{name}.{each}"]) for each in ("qzeros", "qweight"))
        apart = (scales[:, 1::2].int() - zeros).repeat_interleave(128, 1).numpy()
        made.add(elements("int4_group128_f16", codes).astype(np.int64) - apart, stored.numpy(), None)
        made.add_scales(scales[:, 0::2].numpy(), theirs[f"{name}.scales"].T.numpy(), np.zeros(zeros.shape, bool))
    return made


def _of_awq(words: Tensor) -> Tensor:
    """Nibbles [N, K] of AWQ's words [K, N / 8]: the columns that the nibbles of a word stand for are out of order."""
    nibbles = [(words >> (4 * place)) & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)]
    return torch.stack(nibbles, -1).flatten(1).T


def stored_checkpoints() -> list[tuple[str, ...]]:
    """Checkpoints of other tools whose values are read: tool, version, kind, formats, folder, what is the same."""
    rows: list[tuple[str, ...]] = []
    for folder in sorted(path.parent for path in (DATA / "stored").glob("*/expected.npz")):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        names = TOOLS["checkpoints"]
        tool, version = names.get(folder.name) or names[folder.name.partition("_")[0]]
        formats = sorted({f"`{weight.format.name}`" for weight in _read(folder).weights.values()})
        same = "to 2^-22: Quark multiplies by two scales, one after the other" if folder.name in NEARLY else "identical"
        rows.append((tool, version, config["quant_method"], ", ".join(formats), f"`{folder.name}`", same))
    return rows


def _read(folder: Path) -> StoredCheckpoint:
    tensors = load_file(folder / "model.safetensors")
    entries = {name: TensorEntry(name, t.dtype, tuple(t.shape), 0, 0, t.nbytes) for name, t in tensors.items()}
    return read_stored(json.loads((folder / "config.json").read_text()), entries, lambda entry: tensors[entry.name])


@functools.cache
def render() -> dict[str, str]:
    """The tables of docs/parity.md by their names."""
    header = ("scheme", "tool", "version", "of", "codes", "scales", "what differs")
    made = _table(header, [each.row for each in comparisons()])
    read = _table(("tool", "version", "`quant_method`", "formats", "checkpoint", "values"), stored_checkpoints())
    return {"parity": made, "parity_read": read}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
