"""Any shape, dtype, format, piece size and number of workers: what is written is what the kernel makes of the whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantload.checkpoint.headers import TensorEntry, read_header
from quantload.checkpoint.index import Shard
from quantload.checkpoint.output import OutputFolder
from quantload.checkpoint.reader import PieceReader
from quantload.checkpoint.source import FileSource
from quantload.checkpoint.writer import ShardWriter, plan_shards
from quantload.convert.shards import OpenShards
from quantload.convert.tensors import KeptTensor, QuantizedTensor
from quantload.errors import CheckpointError, MissingWeightsError, NonFiniteWeightError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import Tensors
from quantload.kernels.registry import kernel_set
from quantload.model.skeleton import Assignment
from quantload.online.as_stored import StoredParameter, StoredProgress
from quantload.online.parameter import materialized_in
from quantload.online.storage import FinalStorage
from quantload.options import LoadOptions
from quantload.pieces.as_is import plan_as_is
from quantload.pieces.plain import plan_pieces
from quantload.schemes.base import meta_parameter
from quantload.schemes.exported.compressed_tensors import WEIGHTS as COMPRESSED_TENSORS
from quantload.schemes.exported.gpt_oss import WEIGHTS as GPT_OSS
from quantload.schemes.exported.modelopt import WEIGHTS as MODELOPT
from quantload.schemes.exported.own import WEIGHTS as OWN
from quantload.schemes.exported.quark import WEIGHTS as QUARK
from quantload.schemes.exported.registry import EXPORT_FORMATS
from quantload.schemes.exported.weights import ExportedWeight, NamedModules
from quantload.schemes.registry import ENTRIES, SchemeFactory
from quantload.schemes.stored.read import read_stored
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TABLES = {
    "quark": QUARK,
    "compressed-tensors": COMPRESSED_TENSORS,
    "modelopt": MODELOPT,
    "quantload": {name: OWN[name] for name in ("nl4", "mxfp4_rows")},
}
CASES = [
    pytest.param(tool, name, marks=[pytest.mark.slow] if name in ("nvfp4", "nl4", "mxfp4_rows") else [])
    for tool, table in TABLES.items()
    for name in table
]
"""All formats of all tools, and those of quantload alone; two passes over pieces of a few bytes take longest."""
SCHEMES = {entry.linear.name: entry.name for entry in ENTRIES if entry.linear is not None}


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield


def scheme_of(format_name: str) -> Any:
    return SchemeFactory(torch.device("cpu"), LoadOptions()).linear(SCHEMES[format_name])


def convert(
    tensors: dict[str, Tensor], planned: Any, folder: Path, chunk_bytes: int, workers: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are written, and the statistics by module; `planned` makes the plan from the entries."""
    save_file(tensors, folder / "model.safetensors")
    with FileSource(folder) as source:
        header = read_header(source, "model.safetensors")
    plan = planned(header.tensors)
    shards = plan_shards([tensor.specs() for tensor in plan], 10**9)
    statistics: dict[str, Tensor] = {}
    with (
        OutputFolder(folder / "out", "key") as out,
        OpenShards(plan, shards, out, statistics.__setitem__) as conversion,
    ):
        pieces = plan_pieces(conversion.entries, conversion.spans, conversion.sinks, chunk_bytes).pieces
        largest = max((piece.nbytes for piece in pieces), default=chunk_bytes)
        shard = Shard("model.safetensors", header.size)
        conversion.begin()
        PieceReader(FileSource(folder), [shard], workers=workers, chunk_bytes=largest).run(pieces)
        conversion.check_complete()
        out.publish()
    return load_file(folder / "out/model.safetensors"), statistics


def read_back(
    folder: Path, config: dict[str, Any], layout: WeightLayout, spans: Sequence[Span], chunk_bytes: int, workers: int
) -> Tensors:
    """The codes and scales of a parameter of that layout, read from a checkpoint with the weight `a.weight`."""
    layer, fmt, tensors = torch.nn.Module(), layout.format, load_file(folder / "model.safetensors")
    with FileSource(folder) as source:
        header = read_header(source, "model.safetensors")
        checkpoint = read_stored({"quantization_config": config}, header.tensors, lambda entry: tensors[entry.name])
        stored = checkpoint.weights["a.weight"]
        for key, each, shape in zip(fmt.names("weight"), fmt.tensors, layout.shapes, strict=True):
            layer.register_parameter(key, meta_parameter(shape, each.dtype))
        parameter = materialized_in(layer, "weight", "a.weight", layout, FinalStorage(torch.device("cpu")))
        zero_points = any(part.role == "zero_point" for part in stored.parts)
        closures = StoredParameter(parameter, zero_points, stored.zero_point, stored.largest_scale)
        finished: list[bool] = []
        progress = StoredProgress([closures], lambda: finished.append(True))
        pieces = plan_as_is([stored], {"a.weight": spans}, {"a.weight": closures.loaders}, chunk_bytes)
        largest = max(piece.nbytes for piece in pieces)
        shard = Shard("model.safetensors", header.size)
        PieceReader(source, [shard], workers=workers, chunk_bytes=largest).run(pieces)
        assert all(not list(loader.gaps()) for loader in progress.loaders_of(parameter))
    assert finished == [True]
    return tuple(layer.get_parameter(key).data for key in fmt.names("weight"))


def whole(weight: Tensor, scheme: Any) -> Tensors:
    """Codes and scales of a matrix that is quantized at once."""
    tensors: Tensors = scheme.kernels.format.empty(*weight.shape)
    assert kernel_set(scheme.kernels.format.name, "cpu").quantize(weight, tensors) == 0
    return tensors


def raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def check(got: dict[str, Tensor], stem: str, exported: ExportedWeight, tensors: Tensors) -> None:
    for part in exported.parts:
        source = tensors[part.number]
        want = source if part.convert is None else part.convert(source)
        if not part.filled:  # K columns of codes, in bytes, without what fills up the last block
            want = want[:, : got[stem + part.name].shape[1]]
        assert raw(got[stem + part.name]) == raw(want), part.name


@pytest.mark.parametrize(("tool", "format_name"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    chunk_bytes=st.sampled_from((64, 512, 4096, 1 << 20)),
    workers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_matrix_between_others(
    tool: str, format_name: str, rows: int, blocks: int, dtype: torch.dtype, chunk_bytes: int, workers: int, seed: int
) -> None:
    exported, scheme = TABLES[tool][format_name], scheme_of(format_name)
    columns = exported.column_multiple * blocks * (1 if exported.column_multiple >= 32 else 37)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.bias": torch.randn(rows, generator=generator).to(dtype),
        "a.weight": torch.randn(rows, columns, generator=generator).to(dtype),
        "b.mask": torch.tensor([[1, 0], [0, 1]], dtype=torch.bool),
        "c.number": torch.tensor(3),
        "d.empty": torch.empty(0, 7),
    }
    assignment = Assignment("a", "linear", torch.nn.Identity(), scheme, "")
    layout = WeightLayout(scheme.kernels.format, None, (("", rows),), columns)
    spans = (Span("a.weight", Region(None, (0, rows), (0, columns)), 0, columns, 1),)

    def planned(entries: dict[str, TensorEntry]) -> list[Any]:
        quantized = QuantizedTensor(entries["a.weight"], "a.", assignment, scheme, layout, exported, spans)
        return [quantized if name == "a.weight" else KeptTensor(entry) for name, entry in entries.items()]

    with tempfile.TemporaryDirectory() as folder:
        got, statistics = convert(tensors, planned, Path(folder), chunk_bytes, workers)
    check(got, "a.", exported, whole(tensors["a.weight"], scheme))
    for name in tensors.keys() - {"a.weight"}:
        assert got[name].shape == tensors[name].shape
        assert raw(got[name]) == raw(tensors[name]), name
    assert statistics["a"][0] == rows * columns


@pytest.mark.parametrize(("tool", "format_name"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    written=st.sampled_from((64, 512, 4096, 1 << 20)),
    read=st.sampled_from((64, 512, 4096, 1 << 20)),
    multiple=st.sampled_from((1, 32, 64, 128, 256)),
    workers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_back(
    tool: str,
    format_name: str,
    rows: int,
    blocks: int,
    dtype: torch.dtype,
    written: int,
    read: int,
    multiple: int,
    workers: int,
    seed: int,
) -> None:
    """Quantized, written, read beside padding, dequantized: codes, scales and values are those of the whole."""
    exported, scheme = TABLES[tool][format_name], scheme_of(format_name)
    columns = exported.column_multiple * blocks * (1 if exported.column_multiple >= 32 else 37)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    fmt, spans = scheme.kernels.format, (Span("a.weight", Region(None, (0, rows), (0, columns)), 0, columns, 1),)
    assignment = Assignment("a", "linear", torch.nn.Identity(), scheme, "")
    plain = WeightLayout(fmt, None, (("", rows),), columns)

    def planned(entries: dict[str, TensorEntry]) -> list[Any]:
        return [QuantizedTensor(entries["a.weight"], "a.", assignment, scheme, plain, exported, spans)]

    layout = WeightLayout(fmt, None, (("", rows),), columns, (multiple, multiple))
    with tempfile.TemporaryDirectory() as folder:
        convert({"a.weight": weight}, planned, Path(folder), written, workers)
        config = EXPORT_FORMATS[tool].quantization_config(NamedModules({"a": fmt}, weights={"a.weight": plain}))
        padded = read_back(Path(folder) / "out", config, layout, spans, read, workers)
    (part,) = layout.shard_indices()
    tensors, wanted = tuple(each[index] for each, index in zip(padded, part.index, strict=True)), whole(weight, scheme)
    if format_name == "nvfp4" and tool == "compressed-tensors" and dtype == torch.float32:
        # What is stored is the multiplier, which those of two neighbouring scales may have in common.
        torch.testing.assert_close(tensors[2], wanted[2], rtol=2.0**-22, atol=0)
        tensors = (*tensors[:2], wanted[2])
    for got, want in zip(tensors, wanted, strict=True):
        assert raw(got) == raw(want)
    values, expected = torch.empty(rows, columns), torch.empty(rows, columns)
    scheme.kernels.dequantize(tensors, values)
    scheme.kernels.dequantize(wanted, expected)
    assert torch.equal(values, expected)


def test_blocks_of_rows_that_come_apart_are_refused(tmp_path: Path) -> None:
    """Gate and up that are interleaved: one scale stands for rows of both."""
    exported, scheme = COMPRESSED_TENSORS["fp8_block"], scheme_of("fp8_block")
    fmt, rows, columns = scheme.kernels.format, 256, 128
    plain = WeightLayout(fmt, None, (("", rows),), columns)
    span = Span("a.weight", Region(None, (0, rows), (0, columns)), 0, columns, 1)
    assignment = Assignment("a", "linear", torch.nn.Identity(), scheme, "")

    def planned(entries: dict[str, TensorEntry]) -> list[Any]:
        return [QuantizedTensor(entries["a.weight"], "a.", assignment, scheme, plain, exported, (span,))]

    convert({"a.weight": torch.randn(rows, columns)}, planned, tmp_path, 1 << 20, 1)
    halves = WeightLayout(fmt, None, (("w1", 128), ("w3", 128)), columns)
    spans = [
        Span("a.weight", Region(None, (128 * half, 128 * (half + 1)), (0, columns)), half * columns, 2 * columns, 1)
        for half in range(2)
    ]
    config = EXPORT_FORMATS["compressed-tensors"].quantization_config(NamedModules({"a": fmt}))
    with pytest.raises(CheckpointError, match=r"a\.weight_scale: blocks of 128 rows lie across the border"):
        read_back(tmp_path / "out", config, halves, spans, 1 << 20, 1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    experts=st.integers(1, 5),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    chunk_bytes=st.sampled_from((64, 512, 4096, 1 << 20)),
    workers=st.integers(1, 3),
)
def test_transposed_experts(
    experts: int, rows: int, blocks: int, dtype: torch.dtype, chunk_bytes: int, workers: int
) -> None:
    exported, scheme, columns = GPT_OSS["mxfp4"], scheme_of("mxfp4"), 32 * blocks
    weight = torch.randn(experts, columns, rows, generator=torch.Generator().manual_seed(rows)).to(dtype)
    assignment = Assignment("x", "experts", torch.nn.Identity(), scheme, "")
    layout = WeightLayout(scheme.kernels.format, experts, (("", rows),), columns)
    spans = tuple(
        Span("x.down_proj", Region(expert, (0, rows), (0, columns)), expert * rows * columns, 1, rows)
        for expert in range(experts)
    )

    def planned(entries: dict[str, TensorEntry]) -> list[Any]:
        (entry,) = entries.values()
        return [QuantizedTensor(entry, "x.down_proj", assignment, scheme, layout, exported, spans)]

    with tempfile.TemporaryDirectory() as folder:
        got, _ = convert({"x.down_proj": weight}, planned, Path(folder), chunk_bytes, workers)
    parts = [whole(matrix.T.contiguous(), scheme) for matrix in weight]
    check(got, "x.down_proj", exported, tuple(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    assert got["x.down_proj_blocks"].shape == (experts, rows, blocks, 16)


def experts_of(projections: dict[str, tuple[int, int]], count: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The weights of some experts, those of one expert after those of another, as they lie in a file."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"x.experts.{expert}.{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for expert in range(count)
        for name, shape in projections.items()
    }


def plan_of_experts(entries: dict[str, TensorEntry], scheme: Any, exported: ExportedWeight) -> list[Any]:
    """Every tensor quantized for the same module."""
    assignment = Assignment("x.experts", "experts", torch.nn.Identity(), scheme, "")
    planned = []
    for name, entry in entries.items():
        rows, columns = entry.shape
        layout = WeightLayout(scheme.kernels.format, None, (("", rows),), columns)
        spans = (Span(name, Region(None, (0, rows), (0, columns)), 0, columns, 1),)
        planned.append(QuantizedTensor(entry, name.removesuffix("weight"), assignment, scheme, layout, exported, spans))
    return planned


@pytest.mark.parametrize(("tool", "format_name"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    experts=st.integers(2, 7),
    rows=st.sampled_from((1, 8, 13, 128)),
    other_rows=st.sampled_from((3, 16, 128)),
    chunk_bytes=st.sampled_from((64, 4096, 1 << 20)),
    workers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_experts_that_are_alike(
    tool: str, format_name: str, experts: int, rows: int, other_rows: int, chunk_bytes: int, workers: int, seed: int
) -> None:
    """Two that follow each other and a third of another size, taken as stacks: each becomes what it does alone."""
    exported, scheme = TABLES[tool][format_name], scheme_of(format_name)
    columns = exported.column_multiple * (2 if exported.column_multiple >= 32 else 66)
    sizes = {"down": (other_rows, columns), "gate": (rows, columns), "up": (rows, columns)}
    tensors = experts_of(sizes, experts, torch.bfloat16, seed)

    def planned(entries: dict[str, TensorEntry]) -> list[Any]:
        return plan_of_experts(entries, scheme, exported)

    with tempfile.TemporaryDirectory() as folder:
        got, statistics = convert(tensors, planned, Path(folder), chunk_bytes, workers)
    for name, weight in tensors.items():
        check(got, name.removesuffix("weight"), exported, whole(weight, scheme))
    assert statistics.keys() == {"x.experts"}
    assert statistics["x.experts"][0] == sum(weight.numel() for weight in tensors.values())


@pytest.mark.parametrize("format_name", ["mxfp4", "fp8_channel"])
def test_what_is_not_finite_is_named_among_experts_that_are_alike(format_name: str, tmp_path: Path) -> None:
    scheme = scheme_of(format_name)
    tensors = experts_of({"gate": (8, 64), "up": (8, 64)}, 6, torch.bfloat16, 0)
    tensors["x.experts.4.up.weight"][3, 5] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"tensor x\.experts\.4\.up\.weight is not finite at index \[3, 5\]"):
        convert(tensors, lambda entries: plan_of_experts(entries, scheme, QUARK[format_name]), tmp_path, 1 << 20, 1)


def test_missing_experts_are_named(tmp_path: Path) -> None:
    scheme = scheme_of("mxfp4")
    save_file(experts_of({"up": (8, 64)}, 3, torch.bfloat16, 0), tmp_path / "model.safetensors")
    with FileSource(tmp_path) as source:
        header = read_header(source, "model.safetensors")
    plan = plan_of_experts(header.tensors, scheme, QUARK["mxfp4"])
    shards = plan_shards([tensor.specs() for tensor in plan], 10**9)
    with OutputFolder(tmp_path / "out", "key") as out, OpenShards(plan, shards, out, lambda *_: None) as conversion:
        pieces = plan_pieces(conversion.entries[:2], conversion.spans, conversion.sinks, 4096).pieces
        shard = Shard("model.safetensors", header.size)
        PieceReader(FileSource(tmp_path), [shard], workers=1, chunk_bytes=4096).run(pieces)
        with pytest.raises(MissingWeightsError, match=r"written: x\.experts\.2\.up\.weight rows 0:8, columns 0:64$"):
            conversion.check_complete()


def test_experts_that_follow_each_other_are_quantized_and_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, experts = scheme_of("mxfp4"), 60
    tensors = experts_of({"down": (64, 32), "gate": (32, 64), "up": (32, 64)}, experts, torch.bfloat16, 0)
    calls: dict[str, int] = {"quantize": 0, "write_each": 0}

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **more: Any) -> Any:
            calls[name] += 1
            return original(*args, **more)

        monkeypatch.setattr(owner, name, counted)

    count(scheme.quantizer, "quantize")
    count(ShardWriter, "write_each")
    got, _ = convert(tensors, lambda entries: plan_of_experts(entries, scheme, QUARK["mxfp4"]), tmp_path, 1 << 20, 1)
    assert len(got) == 2 * 3 * experts
    assert calls == {"quantize": 3, "write_each": 6}  # all of a projection at once; its codes, and its scales
