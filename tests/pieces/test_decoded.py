"""A weight that is stored column by column, for closures that take whole rows only: any shape, any size of pieces."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_sink import FakeSink
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantload.checkpoint.headers import TensorEntry, read_header
from quantload.checkpoint.index import Shard
from quantload.checkpoint.reader import PieceReader
from quantload.checkpoint.source import FileSource
from quantload.errors import PolicyError
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import MXFP4_ROWS
from quantload.kernels.registry import kernel_set, select
from quantload.pieces.decoded import DecodedWeight
from quantload.pieces.stored import StoredPieces, plan_stored
from quantload.schemes.stored.read import read_stored
from quantload.schemes.stored.weights import StoredWeight
from safetensors.torch import save_file
from torch import Tensor

FILE = "model.safetensors"
KERNELS = kernel_set(MXFP4_ROWS.name, "cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptq of 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False},
}


class RowsLoader(FakeSink):
    """A closure that quantizes whole rows with a multiplier for each, and refuses parts of them."""

    whole_rows = True

    def __init__(self, rows: int, columns: int) -> None:
        self.columns = columns
        self.codes = torch.empty(MXFP4_ROWS.code_shape(rows, columns), dtype=torch.uint8)
        self.scales = torch.empty(MXFP4_ROWS.scale_shape(rows, columns), dtype=torch.uint8)
        self.taken = torch.zeros(rows, dtype=torch.int64)

    def scales_are_local(self, region: Region) -> bool:
        return region.columns == (0, self.columns)

    def load_region(self, weight: Tensor, region: Region) -> None:
        rows = slice(*region.rows)
        assert weight.shape == (rows.stop - rows.start, self.columns)
        KERNELS.quantize(weight.contiguous(), (self.codes[rows], self.scales[rows]))
        self.taken[rows] += 1


def random_tensors(tool: str, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """A linear layer called `x`, of codes of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    bits, groups = 8 if "8" in tool else 4, columns // 32

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    codes = words(columns, rows // 8) if tool == "awq" else words(columns * bits // 32, rows)
    scales = torch.rand(groups, rows, generator=generator).half() + 0.01
    return {"x.qweight": codes, "x.qzeros": words(groups, rows * bits // 32), "x.scales": scales}


def spans_of(weight: StoredWeight, interleaved: bool) -> list[Span]:
    """All of a weight in one parameter, or every other row in another one."""
    rows, columns = weight.rows, weight.columns
    if not interleaved:
        return [Span("x", Region(None, (0, rows), (0, columns)), 0, columns, 1)]
    region = Region(None, (0, rows // 2), (0, columns))
    return [Span(name, region, first * columns, 2 * columns, 1) for first, name in enumerate("xy")]


def read(tool: str, tensors: dict[str, Tensor], entries: dict[str, TensorEntry]) -> StoredWeight:
    (weight,) = read_stored(
        {"quantization_config": CONFIGS[tool]}, entries, lambda entry: tensors[entry.name]
    ).weights.values()
    return weight


def plan(weight: StoredWeight, spans: list[Span], chunk_bytes: int) -> tuple[StoredPieces, dict[str, RowsLoader]]:
    loaders = {span.parameter: RowsLoader(span.region.rows[1], weight.columns) for span in spans}
    dequantizer = functools.partial(select, "dequantize", device="cpu")
    return plan_stored([weight], {weight.name: spans}, loaders, {}, chunk_bytes, dequantizer), loaders


def load(planned: StoredPieces, folder: Path, workers: int = 1) -> None:
    largest = max(planned.scratch_bytes, *(piece.nbytes for piece in planned.pieces))
    shards = [Shard(FILE, (folder / FILE).stat().st_size)]
    PieceReader(FileSource(folder), shards, workers=workers, chunk_bytes=largest).run(planned.pieces)


@pytest.mark.parametrize("tool", list(CONFIGS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    words=st.integers(1, 12),
    groups=st.integers(1, 9),
    least=st.integers(1, 40),
    workers=st.integers(1, 3),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_whole_in_pieces_of_any_size(
    tool: str, words: int, groups: int, least: int, workers: int, interleaved: bool, seed: int
) -> None:
    """`least` is how many times the smallest piece that can be a piece may have; the bytes are those of large ones."""
    rows, columns = 8 * words, 32 * groups
    chunk_bytes = least * columns * torch.float32.itemsize * (8 if tool == "awq" else 1)
    tensors = random_tensors(tool, rows, columns, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(tensors, folder / FILE)
        with FileSource(folder) as source:
            weight = read(tool, tensors, read_header(source, FILE).tensors)
        spans = spans_of(weight, interleaved)
        at_once, whole = plan(weight, spans, 1 << 20)
        load(at_once, folder)
        planned, sinks = plan(weight, spans, chunk_bytes)
        assert planned.scratch_bytes <= chunk_bytes
        assert all(piece.nbytes <= chunk_bytes for piece in planned.pieces if piece.after is not None)
        load(planned, folder, workers)
    for parameter, sink in sinks.items():
        assert torch.equal(sink.codes, whole[parameter].codes)
        assert torch.equal(sink.scales, whole[parameter].scales)
        assert bool((sink.taken == 1).all())


def weight_of(tool: str) -> StoredWeight:
    """64 x 256; where its tensors lie says nothing."""
    tensors = random_tensors(tool, 64, 256, 0)
    return read(tool, tensors, {n: TensorEntry(n, t.dtype, tuple(t.shape), 0, 0, t.nbytes) for n, t in tensors.items()})


@pytest.mark.parametrize(("tool", "least"), [("awq", 8), ("gptq", 1)])
def test_a_piece_that_has_no_room_for_whole_rows_is_refused(tool: str, least: int) -> None:
    """The rows that stand in one word of AWQ; one row of GPTQ."""
    weight = weight_of(tool)
    smallest = least * 256 * 4
    planned, _ = plan(weight, spans_of(weight, False), smallest)
    assert planned.scratch_bytes == smallest
    with pytest.raises(PolicyError, match=rf"x\.weight .* {least} whole rows .* chunk_bytes={smallest}$"):
        plan(weight, spans_of(weight, False), smallest - 1)


def test_codes_are_read_once_where_they_fit_a_piece() -> None:
    """Their values do not: those of rows after rows are made of the same read."""
    weight = weight_of("awq")
    planned, _ = plan(weight, spans_of(weight, False), 64 * 256 // 2)
    codes = [piece for piece in planned.pieces if piece.nbytes == 64 * 256 // 2]
    assert len(codes) == 1
    assert len(codes[0].extents) == 1
    assert planned.scratch_bytes == 8 * 256 * 4


def test_rows_of_wide_blocks_are_cut_where_a_piece_ends() -> None:
    """A row of blocks of FP8 is 128 rows, which may be larger than a piece."""
    shapes = {"x.weight": (torch.float8_e4m3fn, (256, 4096)), "x.weight_scale_inv": (torch.float32, (2, 32))}
    entries = {n: TensorEntry(n, dtype, shape, 0, 0, torch.Size(shape).numel() * dtype.itemsize)
               for n, (dtype, shape) in shapes.items()}  # fmt: skip
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    weight = read_stored(config, entries, lambda entry: torch.empty(entry.shape)).weights["x.weight"]
    limit = 32 * 4096 * torch.float32.itemsize
    sinks = {"x": RowsLoader(256, 4096)}
    found = DecodedWeight(weight, lambda _: KERNELS.dequantize).cut(spans_of(weight, False), sinks, limit)
    assert [(slab.low, slab.high) for slab in found] == [(low, low + 32) for low in range(0, 256, 32)]


def test_scales_are_held_until_the_last_codes_have_come(tmp_path: Path) -> None:
    tensors = random_tensors("awq", 64, 256, 0)
    save_file(tensors, tmp_path / FILE)
    with FileSource(tmp_path) as source:
        weight = read("awq", tensors, read_header(source, FILE).tensors)
    on_its_way = DecodedWeight(weight, lambda name: select("dequantize", name, "cpu"))
    held = []

    class Watching(RowsLoader):
        def load_region(self, weight: Tensor, region: Region) -> None:
            held.append(on_its_way._scales is not None)
            super().load_region(weight, region)

    sinks = {"x": Watching(64, 256)}
    spans = spans_of(weight, False)
    slabs = on_its_way.cut(spans, sinks, 16 * 256 * torch.float32.itemsize)
    pieces = [*on_its_way.scale_pieces(1 << 20), *on_its_way.pieces(slabs, sinks, None)]
    load(StoredPieces(pieces, 1 << 20, 0), tmp_path)
    assert held == [True] * len(slabs)
    assert on_its_way._scales is None
