"""Small neighbours: few reads, few calls, and the same bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.checkpoint.pieces import MAX_SHARED_READ, Piece
from quantload.errors import NonFiniteWeightError, RepeatedRegionError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import kernel_set
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.online.sink import Sink
from quantload.pieces.plain import plan_pieces
from quantload.pieces.plain_bundles import stacks
from quantload.schemes.base import Quantizer, TensorStats, meta_parameter
from quantload.schemes.moe import QuantizedMoEScheme
from torch import Tensor, nn

EXPERTS, INTERMEDIATE, HIDDEN = 12, 32, 64
GATE, UP, DOWN = ("gate", (0, INTERMEDIATE)), ("up", (INTERMEDIATE, 2 * INTERMEDIATE)), ("down", (0, HIDDEN))


class Workspace:
    """What a delivery sees of the reader."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


class Layer(nn.Module):
    """What `create_weights` leaves."""

    weight_layouts: dict[str, WeightLayout]


class Checkpoint:
    """One tensor an expert and projection, on its way into one experts layer."""

    def __init__(self, format_name: str, order: list[tuple[str, int]]) -> None:
        fmt = FORMATS[format_name]
        self.layer = Layer()
        self.layer.weight_layouts = {
            "gate_up_proj": WeightLayout(fmt, EXPERTS, (("w1", INTERMEDIATE), ("w3", INTERMEDIATE)), HIDDEN),
            "down_proj": WeightLayout(fmt, EXPERTS, (("w2", HIDDEN),), INTERMEDIATE),
        }
        for name, layout in self.layer.weight_layouts.items():
            self.layer.register_parameter(name, meta_parameter(layout.shapes[0], fmt.code_dtype))
            self.layer.register_parameter(f"{name}_scale", meta_parameter(layout.shapes[1], fmt.scale_dtype))

        class Scheme(QuantizedMoEScheme):
            def apply(self, *_: Any) -> Tensor:
                raise NotImplementedError

        self.calls: list[tuple[int, ...]] = []
        scheme = Scheme(format_name, Quantizer(kernel_set(format_name, "cpu")))
        quantize = scheme.quantize_expert

        def noted(weight: Tensor, *args: Any, **kwargs: Any) -> TensorStats:
            self.calls.append(tuple(weight.shape))
            return quantize(weight, *args, **kwargs)

        scheme.quantize_expert = noted  # type: ignore[method-assign]
        self.statistics: list[Tensor] = []
        self.loader = MoeOnlineWeightLoader(
            self.layer, scheme, on_finished=lambda values, _: self.statistics.append(values)
        )
        self.sinks: dict[str, Sink] = {name: self.loader.bound(name) for name in self.layer.weight_layouts}
        self._make_tensors(order)

    def _make_tensors(self, order: list[tuple[str, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.entries: list[TensorEntry] = []
        self.tensors: dict[str, Tensor] = {}
        self.spans: dict[str, list[Span]] = {}
        at = 0
        drawn = {
            (kind, expert): torch.randn(
                rows[1] - rows[0], INTERMEDIATE if kind == "down" else HIDDEN, generator=generator
            )
            for (kind, rows), expert in itertools.product((GATE, UP, DOWN), range(EXPERTS))
        }
        for kind, expert in order:
            rows = {"gate": GATE, "up": UP, "down": DOWN}[kind][1]
            tensor, name = drawn[kind, expert].to(torch.bfloat16), f"{kind}.{expert}"
            parameter = "down_proj" if kind == "down" else "gate_up_proj"
            self.tensors[name] = tensor
            self.entries.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape), 0, at, tensor.nbytes))
            self.spans[name] = [Span(parameter, Region(expert, rows, (0, tensor.shape[1])), 0, tensor.shape[1], 1)]
            at += tensor.nbytes

    def load(self, chunk_bytes: int = 1 << 23) -> list[Piece]:
        file = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in self.tensors.values()])
        pieces = plan_pieces(self.entries, self.spans, self.sinks, chunk_bytes).pieces
        for piece in pieces:
            ((offset, length),) = piece.extents
            piece.deliver(Workspace(file[offset : offset + length]))  # type: ignore[arg-type]
        return pieces

    def bytes(self) -> list[Tensor]:
        return [tensor.view(torch.uint8) for tensor in self.layer.state_dict().values()]


ORDERS = {
    "by number": [(kind, e) for e in range(EXPERTS) for kind in ("down", "gate", "up")],
    "by text": [(kind, e) for e in sorted(range(EXPERTS), key=str) for kind in ("down", "gate", "up")],
    "by kind": [(kind, e) for kind in ("gate", "up", "down") for e in range(EXPERTS)],
    "backwards": [(kind, e) for e in reversed(range(EXPERTS)) for kind in ("up", "gate", "down")],
}


def one_by_one(format_name: str) -> Checkpoint:
    checkpoint = Checkpoint(format_name, ORDERS["by number"])
    for entry in checkpoint.entries:
        (span,) = checkpoint.spans[entry.name]
        checkpoint.sinks[span.parameter].load_region(checkpoint.tensors[entry.name], span.region)
    return checkpoint


@pytest.mark.parametrize("chunk_bytes", [1 << 23, 30_000, 4096])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("format_name", ["mxfp4", "int8_channel", "fp8_tensor", "fp8_block"])
def test_bundles_leave_the_bytes_that_single_tensors_leave(format_name: str, order: str, chunk_bytes: int) -> None:
    bundled, single = Checkpoint(format_name, ORDERS[order]), one_by_one(format_name)
    bundled.load(chunk_bytes)
    assert all(map(torch.equal, bundled.bytes(), single.bytes()))
    # Sums of squares are rounded to float32 tile by tile, and tiles depend on the length of a row.
    torch.testing.assert_close(bundled.statistics[0], single.statistics[0], rtol=1e-5, atol=0)


def test_a_layer_is_one_piece_and_one_call_a_parameter() -> None:
    checkpoint = Checkpoint("mxfp4", ORDERS["by number"])
    assert len(checkpoint.load()) == 1
    assert sorted(checkpoint.calls) == [(EXPERTS, HIDDEN * INTERMEDIATE), (EXPERTS, 2 * INTERMEDIATE * HIDDEN)]


def test_experts_sorted_as_text_take_few_calls() -> None:
    """0 1 | 10 11 | 2 .. 9: the experts of every run are one call."""
    checkpoint = Checkpoint("mxfp4", ORDERS["by text"])
    checkpoint.load()
    assert len(checkpoint.calls) == 2 * 3


def test_a_bundle_is_no_larger_than_a_shared_read() -> None:
    order = ORDERS["by number"]
    assert len(Checkpoint("mxfp4", order).load(20_000)) > 5
    assert all(piece.nbytes <= 20_000 for piece in Checkpoint("mxfp4", order).load(20_000))
    assert all(piece.nbytes <= MAX_SHARED_READ for piece in Checkpoint("mxfp4", order).load())


@pytest.mark.parametrize("name", ["gate.0", "down.7", "up.11"])
@pytest.mark.parametrize("format_name", ["mxfp4", "int8_channel"])
def test_a_nan_in_a_bundle_is_named_by_its_own_tensor(format_name: str, name: str) -> None:
    checkpoint = Checkpoint(format_name, ORDERS["by text"])
    checkpoint.tensors[name][5, 3] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=rf"tensor {name} is not finite at index \[5, 3\]"):
        checkpoint.load()


def test_a_stack_that_arrives_twice_is_an_error() -> None:
    checkpoint = Checkpoint("mxfp4", ORDERS["by number"])
    checkpoint.load()
    with pytest.raises(RepeatedRegionError, match="expert 0"):
        checkpoint.load()


def span(parameter: str, expert: int | None, rows: tuple[int, int], columns: tuple[int, int] = (0, 4)) -> Span:
    return Span(parameter, Region(expert, rows, columns), 0, 4, 1)


def test_what_makes_a_stack() -> None:
    found = list(stacks([span("p", e, (0, 2)) for e in (3, 5, 7)]))
    assert [(s.experts, *s.offsets, *s.pitches) for s in found] == [(range(3, 9, 2), 0, 8)]
    falling = list(stacks([span("p", e, (0, 2)) for e in (5, 3)]))
    assert [s.region.expert for s in falling] == [5, 3]
    uneven = list(stacks([span("p", 0, (0, 2)), span("p", 1, (0, 2)), span("q", 0, (0, 2)), span("p", 2, (0, 2))]))
    assert sorted((s.parameter, s.count) for s in uneven) == [("p", 1), ("p", 2), ("q", 1)]
    other_rows = list(stacks([span("p", 0, (0, 2)), span("p", 1, (2, 4))]))
    assert [s.count for s in other_rows] == [1, 1]
    without_experts = list(stacks([span("p", None, (0, 2)), span("p", None, (4, 6))]))
    assert [s.count for s in without_experts] == [1, 1]


def test_what_is_joined() -> None:
    (joined,) = stacks([span("p", None, (0, 2)), span("p", None, (2, 5))])
    assert joined.region == Region(None, (0, 5), (0, 4))
    apart = list(stacks([span("p", None, (0, 2)), span("p", None, (2, 4), (4, 8)), span("q", None, (4, 6))]))
    assert len(apart) == 3
