"""Whatever the spans and the chunk size: every element of every region arrives exactly once, with its own value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from fake_sink import FakeSink
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from quantload.checkpoint.headers import TensorEntry
from quantload.checkpoint.pieces import Piece, check_barriers
from quantload.errors import NonFiniteWeightError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Interval, Region
from quantload.geometry.spans import Landing, Span
from quantload.kernels.formats import FP8_CHANNEL, FP8_TENSOR, RowMultiplied, WeightFormat
from quantload.model.coordinates import Coordinates
from quantload.model.routes import _spans
from quantload.online.sink import Sink
from quantload.online.storage import FinalStorage
from quantload.online.weight_loader import DirectWeightLoader
from quantload.pieces.cuts import cut_tensor
from quantload.pieces.plain import plan_pieces
from torch import Tensor, nn

U8 = torch.uint8
# Small blocks, so that small matrices have many of them.
FORMATS = {
    "row": FP8_CHANNEL,
    "tensor": FP8_TENSOR,
    "nibbles": WeightFormat("nibbles", U8, U8, 1, 4, 4, pads_cols=True),
    "block": WeightFormat("block", U8, torch.float32, 3, 4, 8),
    "multiplied": RowMultiplied(
        "multiplied", U8, U8, 1, 0, 4, blocks=WeightFormat("n", U8, U8, 1, 4, 4, pads_cols=True)
    ),
}


@dataclasses.dataclass
class FakeWorkspace:
    """What a delivery sees of the reader."""

    buffer: Tensor
    limit: int

    def scratch(self, nbytes: int) -> Tensor:
        assert nbytes <= self.limit
        return torch.full((nbytes,), 255, dtype=torch.uint8)


class CheckingLoader(FakeSink):
    """A closure that knows what has to arrive."""

    def __init__(self, layout: WeightLayout, expected: Tensor) -> None:
        self.layout, self.align = layout, layout.align
        self.expected = expected.reshape(layout.experts or 1, layout.rows, layout.columns)
        self.arrived = torch.zeros_like(self.expected, dtype=torch.int)
        self.observed = torch.zeros_like(self.expected, dtype=torch.int)

    def scales_are_local(self, region: Region) -> bool:
        return self.layout.whole(region)

    def load_region(self, piece: Tensor, region: Region) -> None:
        expert = region.expert or 0
        if not self.layout.whole(region):
            assert (self.observed[expert] == 1).all(), "its scales are not known yet"
        self._check(piece, region)
        self._part(self.arrived, region).add_(1)

    def load_experts(self, pieces: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        assert len(pieces) == len(experts) > 1
        super().load_experts(pieces, experts, rows, columns)

    def observe(self, piece: Tensor, region: Region) -> None:
        self._check(piece, region)
        self._part(self.observed, region).add_(1)

    def _check(self, piece: Tensor, region: Region) -> None:
        assert torch.equal(piece, self._part(self.expected, region))
        assert piece.shape[1] == 1 or piece.stride(1) == 1

    @staticmethod
    def _part(tensor: Tensor, region: Region) -> Tensor:
        return tensor[region.expert or 0, slice(*region.rows), slice(*region.columns)]

    def check_done(self) -> None:
        assert (self.arrived == 1).all()
        for matrix in self.observed:
            assert (matrix == 0).all() or (matrix == 1).all()


@dataclasses.dataclass
class World:
    """A checkpoint in memory and the parameters it goes to."""

    data: dict[str, Tensor]
    sinks: dict[str, Sink] = dataclasses.field(default_factory=dict)
    spans: dict[str, list[Span]] = dataclasses.field(default_factory=dict)
    whole: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    modules: dict[str, Any] = dataclasses.field(default_factory=dict)

    def entries(self) -> list[TensorEntry]:
        at, found = 0, []
        for name, tensor in self.data.items():
            found.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape), 0, at, tensor.nbytes))
            at += tensor.nbytes
        return found

    def coordinates(self) -> dict[str, Coordinates]:
        return {
            name: Coordinates.of(i, tensor.shape, tensor.dtype) for i, (name, tensor) in enumerate(self.data.items())
        }

    def quantized(self, name: str, fmt: WeightFormat, operation: Operation, shards: int, transposed: bool) -> None:
        """A parameter quantized in `fmt`: two-dimensional, or experts of it."""
        moved, expected = operation(self.coordinates()), operation(self.data)
        expected = expected.transpose(-1, -2) if transposed else expected
        *experts, rows, columns = expected.shape
        parts = tuple((f"s{i}", rows // shards) for i in range(shards))
        layout = WeightLayout(fmt, experts[0] if experts else None, parts, columns)
        self.sinks[name] = CheckingLoader(layout, expected)
        self._route(name, moved, Landing(layout.experts, rows, columns, transposed, layout))

    def direct(self, name: str, operation: Operation) -> None:
        """A parameter kept as stored."""
        moved, self.whole[name] = operation(self.coordinates()), operation(self.data)
        module = self.modules[name] = nn.Module()
        module.register_parameter("p", nn.Parameter(torch.empty(self.whole[name].shape, device="meta")))
        loader = DirectWeightLoader(module, "p", name, torch.float32, FinalStorage(torch.device("cpu")))
        self.sinks[name] = loader
        self._route(name, moved, Landing(None, loader.rows, loader.columns))

    def _route(self, name: str, moved: Any, landing: Landing) -> None:
        names = list(self.data)
        for source, region, offset, row_stride, column_stride in _spans(moved, landing):
            span = Span(name, region, offset, row_stride, column_stride)
            assert landing.layout is None or landing.layout.code_aligned(span.region)
            self.spans.setdefault(names[source], []).append(span)

    def run(self, chunk_bytes: int) -> list[Piece]:
        """Read and deliver every piece, in order."""
        entries = self.entries()
        file = torch.cat([tensor.contiguous().reshape(-1).view(U8) for tensor in self.data.values()])
        pieces = plan_pieces(entries, self.spans, self.sinks, chunk_bytes).pieces
        check_barriers(pieces)
        for piece in pieces:
            assert all(offset >= 0 and offset + length <= file.numel() for offset, length in piece.extents)
            read = torch.cat([file[offset : offset + length] for offset, length in piece.extents])
            if piece.target is not None:
                piece.target().copy_(read)
            assert piece.after is None or piece.after.wait(0)
            piece.deliver(FakeWorkspace(read, piece.nbytes))  # type: ignore[arg-type]
            if piece.signal is not None:
                piece.signal.signal()
        for name, sink in self.sinks.items():
            if isinstance(sink, DirectWeightLoader):
                assert sink.tracker.complete, name
                assert torch.equal(self.modules[name].p, self.whole[name]), name
            else:
                assert isinstance(sink, CheckingLoader)
                sink.check_done()
        return pieces


Operation = Callable[[Mapping[str, Any]], Any]


def rows_of(rows: slice, tensors: Mapping[str, Any]) -> Any:
    """Some rows of the first tensor."""
    return tensors["t0"][rows]


def numbers(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors t0, t1, ... without two equal elements."""
    data, at = {}, 0
    for i, shape in enumerate(shapes):
        count = torch.Size(shape).numel()
        data[f"t{i}"] = torch.arange(at, at + count, dtype=torch.float32).reshape(shape)
        at += count
    return data


def deinterleaved(x: Any) -> Any:
    """[..., 2I, K] with gate and up taking turns, to all of gate over all of up."""
    e, rows, columns = x.shape
    return x.reshape(e, rows // 2, 2, columns).transpose(1, 2).reshape(e, rows, columns)


def build(kind: str, fmt: WeightFormat, n: int, k: int, experts: int) -> World:
    """One way a checkpoint and its parameters may relate; `n` is even."""
    if kind == "linear":
        world = World(numbers((n, k)))
        world.quantized("p", fmt, lambda t: t["t0"], 1, False)
    elif kind == "conv1d":
        world = World(numbers((k, n)))
        world.quantized("p", fmt, lambda t: t["t0"], 1, True)
    elif kind == "fused to three":
        world = World(numbers((3 * n, k)))
        for i in range(3):
            world.quantized(f"p{i}", fmt, partial(rows_of, slice(i * n, (i + 1) * n)), 1, False)
    elif kind == "two tensors to one":
        world = World(numbers((n, k), (n + 1, k)))
        world.quantized("p", fmt, lambda t: torch.cat([t["t0"], t["t1"]]), 1, False)
    elif kind == "split columns":
        world = World(numbers((n, 8), (n, k)))
        world.quantized("p", fmt, lambda t: torch.cat([t["t0"], t["t1"]], dim=1), 1, False)
    elif kind == "some of the columns":
        world = World(numbers((n, k + 8)))
        world.quantized("p", fmt, lambda t: t["t0"][:, 8:], 1, False)
    elif kind == "one tensor per expert":
        world = World(numbers(*[(n // 2, k)] * (2 * experts)))
        names = list(world.data)
        gate, up = names[::2], names[1::2]
        world.quantized(
            "p",
            fmt,
            lambda t: torch.cat([torch.stack([t[x] for x in gate]), torch.stack([t[x] for x in up])], dim=1),
            2,
            False,
        )
    elif kind == "stacked experts":
        world = World(numbers((experts, n, k)))
        world.quantized("p", fmt, lambda t: t["t0"], 2, False)
    elif kind == "transposed experts":
        world = World(numbers((experts, k, n)))
        world.quantized("p", fmt, lambda t: t["t0"], 2, True)
    elif kind == "interleaved experts":
        world = World(numbers((experts, n, k)))
        world.quantized("p", fmt, lambda t: deinterleaved(t["t0"]), 2, False)
    elif kind == "interleaved transposed experts":
        world = World(numbers((experts, k, n)))
        world.quantized("p", fmt, lambda t: deinterleaved(t["t0"].transpose(1, 2)), 2, False)
    else:
        world = World(numbers((n,), (), (experts, n, k), (k, n), (n, k)))
        world.direct("vector", lambda t: t["t0"])
        world.direct("scalar", lambda t: t["t1"])
        world.direct("cube", lambda t: t["t2"])
        world.direct("turned", lambda t: t["t3"].transpose(0, 1).contiguous())
        world.direct("lifted", lambda t: t["t4"].reshape(1, n * k).unsqueeze(0))
    return world


KINDS = (
    "linear", "conv1d", "fused to three", "two tensors to one", "split columns", "some of the columns",
    "one tensor per expert",
    "stacked experts", "transposed experts", "interleaved experts", "interleaved transposed experts", "direct",
)  # fmt: skip


def largest_tile(world: World) -> int:
    """Bytes of the largest part that must be read together: one scale block, and what lies between its elements."""
    tiles = [0]
    for spans in world.spans.values():
        for span in spans:
            (top, bottom), (left, right) = span.region.rows, span.region.columns
            rows, columns = world.sinks[span.parameter].align
            strides = [span.row_stride] * (bottom - top > 1) + [span.column_stride] * (right - left > 1)
            tiles.append(4 * rows * columns * min(strides, default=1))
    return max(tiles)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 9), st.integers(1, 19), st.integers(1, 3), st.integers(1, 1200))
def test_every_element_arrives_once_with_its_value(
    kind: str, fmt: str, half: int, k: int, experts: int, chunk_bytes: int
) -> None:
    assume((kind, fmt) != ("split columns", "multiplied"))  # which is converted whole, as it has no spans
    world = build(kind, FORMATS[fmt], 2 * half, k, experts)
    pieces = world.run(chunk_bytes)
    limit = max(chunk_bytes, largest_tile(world))
    assert all(piece.nbytes <= limit for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_chunk_reads_every_byte_once(kind: str) -> None:
    """Nothing needs a second pass, and no tensor a second piece, where a whole matrix fits."""
    world = build(kind, FORMATS["nibbles"], 8, 16, 2)
    pieces = world.run(1 << 20)
    unused = 0 if kind != "some of the columns" else 4 * 8 * 8  # as many in each row
    assert sum(piece.nbytes for piece in pieces) == sum(tensor.nbytes for tensor in world.data.values()) - unused
    assert all(piece.after is None and piece.signal is None for piece in pieces)


def test_rows_larger_than_a_chunk_of_a_per_row_format_go_twice() -> None:
    world = build("linear", FORMATS["row"], 4, 64, 1)
    pieces = world.run(64)
    assert sum(piece.nbytes for piece in pieces) == 2 * 4 * 64 * 4
    first, second = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    assert all(piece.signal is not None and piece.after is None for piece in first)
    assert all(piece.after is not None and piece.signal is None for piece in second)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "transposed experts", "interleaved transposed experts"])
def test_rows_that_must_be_whole_are_read_once_however_they_lie(kind: str) -> None:
    """A transposed matrix is cut into some of its columns, line after line; a row larger than a chunk stays whole."""
    for chunk_bytes in (64, 1024):
        pieces = build(kind, FORMATS["multiplied"], 32, 64, 2).run(chunk_bytes)
        assert all(piece.after is None and piece.signal is None for piece in pieces)
        assert max(len(piece.extents) for piece in pieces) == (1 if kind == "linear" else 64)


def test_one_scale_for_a_tensor_reads_twice_only_what_does_not_fit() -> None:
    once = build("linear", FORMATS["tensor"], 4, 8, 1).run(4 * 4 * 8)
    twice = build("linear", FORMATS["tensor"], 4, 8, 1).run(4 * 4 * 8 - 1)
    assert len(once) == 1
    assert sum(piece.nbytes for piece in twice) == 2 * 4 * 4 * 8


def test_a_long_vector_behind_a_dimension_of_one_is_cut() -> None:
    """A dimension that unsqueeze added has stride 0: the line is long although the matrix has one row."""
    world = World(numbers((4096,)))
    world.quantized("p", FORMATS["nibbles"], lambda t: t["t0"].unsqueeze(0), 1, False)
    assert max(piece.nbytes for piece in world.run(512)) <= 512


def test_interleaved_halves_share_their_reads() -> None:
    """Gate and up rows that take turns on disk are read once, not once for each half."""
    world = build("interleaved experts", FORMATS["nibbles"], 32, 16, 2)
    pieces = world.run(1024)
    assert sum(piece.nbytes for piece in pieces) == 2 * 32 * 16 * 4
    assert len(pieces) == 4


def test_a_whole_tensor_kept_as_stored_is_read_into_its_final_place() -> None:
    world = World(numbers((16, 16)))
    world.direct("p", lambda t: t["t0"])
    assert all(piece.target is not None for piece in world.run(128))


def test_another_dtype_is_converted_on_the_way() -> None:
    world = World({"t0": torch.arange(64).reshape(8, 8).to(torch.bfloat16)})
    world.direct("p", lambda t: t["t0"])
    pieces = world.run(32)
    assert all(piece.target is None for piece in pieces)
    assert world.modules["p"].p.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "index"), [("linear", [5, 3]), ("conv1d", [3, 5]), ("interleaved experts", [1, 5, 3])]
)
@pytest.mark.parametrize("chunk_bytes", [16, 64, 4096])
def test_a_nan_is_named_by_the_checkpoints_own_index(kind: str, index: list[int], chunk_bytes: int) -> None:
    world = build(kind, FORMATS["nibbles"], 8, 8, 2)
    world.data["t0"][tuple(index)] = torch.nan

    class Refusing(CheckingLoader):
        def load_region(self, piece: Tensor, region: Region) -> None:
            found = piece.isnan().nonzero()
            if len(found):
                error = NonFiniteWeightError("not finite")
                error.position = (int(found[0, 0]), int(found[0, 1]))
                raise error

    for name, sink in world.sinks.items():
        assert isinstance(sink, CheckingLoader)
        world.sinks[name] = Refusing(sink.layout, sink.expected)
    with pytest.raises(
        NonFiniteWeightError, match=rf"tensor t0 .* index \[{', '.join(map(str, index))}\] \(goes to p\).*--ignore 'p'"
    ):
        world.run(chunk_bytes)


def test_cuts_begin_at_scale_blocks() -> None:
    world = build("linear", FORMATS["block"], 12, 16, 1)
    (entry,) = world.entries()
    for cut in cut_tensor(entry, world.spans["t0"], world.sinks, 4 * 3 * 16 + 3):
        for part in cut.parts:
            assert part.region.rows[0] % 3 == 0
            assert part.region.columns == (0, 16)
