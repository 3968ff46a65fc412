"""An experts layer whose weights are stored quantized, one an expert and projection, in a file made of bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.checkpoint.pieces import Piece, check_barriers
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import kernel_set, select
from quantload.online.as_stored import StoredParameter, StoredProgress
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.online.parameter import materialized_in
from quantload.online.sink import Sink
from quantload.online.storage import FinalStorage
from quantload.pieces.stored import StoredPieces, plan_stored
from quantload.schemes.base import Quantizer, meta_parameter
from quantload.schemes.moe import QuantizedMoEScheme
from quantload.schemes.stored.layouts import float32
from quantload.schemes.stored.weights import Role, StoredTensor, StoredWeight
from torch import Tensor, nn

EXPERTS, INTERMEDIATE, HIDDEN = 12, 128, 256
SHAPES = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}

Order = Callable[[str, int, str], Any]
"""Where the tensor of a role, of a projection and an expert, stands in the file: a key to sort by."""

ORDERS: dict[str, Order] = {
    "codes beside scales": lambda kind, expert, role: (expert, kind, role),
    "scales first": lambda kind, expert, role: (role == "codes", expert, kind),
    "by text": lambda kind, expert, role: (str(expert), kind, role),
    "scales first, by text": lambda kind, expert, role: (role == "codes", str(expert), kind),
    "backwards": lambda kind, expert, role: (-expert, kind, role),
    "scales backwards": lambda kind, expert, role: (role == "codes", expert if role == "codes" else -expert, kind),
}


class Workspace:
    """What a delivery sees of the reader."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


class Layer(nn.Module):
    """What `create_weights` leaves."""

    weight_layouts: dict[str, WeightLayout]


class StoredExperts:
    """The tensors of one layer in `stored` format, and the closures of a layer in `wanted` format.

    `hole` bytes of something else stand after every tensor, `zeros` adds zero points that must be zero, `shapes` the
    rows and columns of every weight.
    """

    def __init__(
        self, stored: str, wanted: str, order: str, hole: int = 0, zeros: bool = False, shapes: bool = False
    ) -> None:
        self.format, self.wanted = FORMATS[stored], FORMATS[wanted]
        self.tensors = dict(_tensors(stored, zeros))
        if shapes:
            self.tensors |= {(*key, "shape"): torch.tensor(SHAPES[key[0]]) for key in self._keys()}
        self.entries: dict[tuple[str, int, str], TensorEntry] = {}
        self.size = 0
        for key in sorted(self.tensors, key=lambda key: ORDERS[order](*key)):
            tensor = self.tensors[key]
            name = ".".join(map(str, key))
            self.entries[key] = TensorEntry(name, tensor.dtype, tuple(tensor.shape), 0, self.size, tensor.nbytes)
            self.size += tensor.nbytes + hole
        self.layer = Layer()
        self.layer.weight_layouts = {
            "gate_up_proj": WeightLayout(self.wanted, EXPERTS, (("w1", INTERMEDIATE), ("w3", INTERMEDIATE)), HIDDEN),
            "down_proj": WeightLayout(self.wanted, EXPERTS, (("w2", HIDDEN),), INTERMEDIATE),
        }
        for name, layout in self.layer.weight_layouts.items():
            self.layer.register_parameter(name, meta_parameter(layout.shapes[0], self.wanted.code_dtype))
            self.layer.register_parameter(f"{name}_scale", meta_parameter(layout.shapes[1], self.wanted.scale_dtype))
        self.finished = 0
        self.calls: list[tuple[int, ...]] = []
        self.as_is: dict[str, Mapping[Role, Sink]] = self._copied() if stored == wanted else {}
        self.sinks: dict[str, Sink] = {name: own["codes"] for name, own in self.as_is.items()} or self._anew()

    def plan(self, chunk_bytes: int = 1 << 23) -> StoredPieces:
        """The pieces of all weights, in the order of their codes."""
        weights = sorted((self._weight(*key) for key in self._keys()), key=lambda weight: weight.offset)
        spans = {weight.name: [self._span(*weight.name.split("."))] for weight in weights}
        dequantizer = functools.partial(select, "dequantize", device="cpu")
        return plan_stored(weights, spans, self.sinks, self.as_is, chunk_bytes, dequantizer)

    def load(self, chunk_bytes: int = 1 << 23) -> list[Piece]:
        """Read and deliver all pieces; fails where one would have to wait."""
        file = torch.zeros(self.size, dtype=torch.uint8)
        for key, entry in self.entries.items():
            part = file[entry.offset : entry.offset + entry.nbytes]
            part.copy_(self.tensors[key].contiguous().view(-1).view(torch.uint8))
        pieces = self.plan(chunk_bytes).pieces
        check_barriers(pieces)
        for piece in pieces:
            ((offset, length),) = piece.extents
            assert length <= max(chunk_bytes, max(entry.nbytes for entry in self.entries.values()))
            assert piece.after is None or piece.after.wait(0)
            buffer = file[offset : offset + length].clone()
            if piece.target is not None:
                buffer = piece.target().copy_(buffer)
            piece.deliver(Workspace(buffer))  # type: ignore[arg-type]
            if piece.signal is not None:
                piece.signal.signal()
        return pieces

    def bytes(self) -> list[Tensor]:
        """Codes and scales of the layer."""
        return [tensor.view(torch.uint8) for tensor in self.layer.state_dict().values()]

    def stacked(self, role: str) -> list[Tensor]:
        """What the kept layer should hold of a role: gate over up, and down."""
        each = [[self.tensors[kind, expert, role] for expert in range(EXPERTS)] for kind in SHAPES]
        gate, up, down = (torch.stack([tensor.view(torch.uint8) for tensor in tensors]) for tensors in each)
        return [torch.cat((gate, up), dim=1), down]

    def _keys(self) -> Iterator[tuple[str, int]]:
        return ((kind, expert) for expert in range(EXPERTS) for kind in SHAPES)

    def _weight(self, kind: str, expert: int) -> StoredWeight:
        def part(role: Any, block: int = 1, convert: Any = None) -> StoredTensor:
            return StoredTensor(role, self.entries[kind, expert, role], block, convert)

        parts = [part("codes"), part("scale", self.format.block_rows, None if self.format.name == "mxfp4" else float32)]
        parts += [part(role, 0) for role in ("must_be_zero", "shape") if (kind, expert, role) in self.entries]
        return StoredWeight(f"{kind}.{expert}", self.format, None, *SHAPES[kind], torch.bfloat16, tuple(parts))

    @staticmethod
    def _span(kind: str, expert: str) -> Span:
        rows, columns = SHAPES[kind]
        first = INTERMEDIATE if kind == "up" else 0
        parameter = "down_proj" if kind == "down" else "gate_up_proj"
        return Span(parameter, Region(int(expert), (first, first + rows), (0, columns)), 0, columns, 1)

    def _copied(self) -> dict[str, Mapping[Role, Sink]]:
        storage = FinalStorage(torch.device("cpu"))
        self.parameters = [
            StoredParameter(materialized_in(self.layer, name, name, layout, storage), False, 0.0, torch.inf)
            for name, layout in self.layer.weight_layouts.items()
        ]
        StoredProgress(self.parameters, self._finish)
        for parameter in self.parameters:
            for loader in parameter.loaders.values():
                self._count(loader, "load_experts")
        return {
            name: parameter.loaders for name, parameter in zip(self.layer.weight_layouts, self.parameters, strict=True)
        }

    def _anew(self) -> dict[str, Sink]:
        format_name = self.wanted.name

        class Scheme(QuantizedMoEScheme):
            def apply(self, *_: Any) -> Tensor:
                raise NotImplementedError

        scheme = Scheme(format_name, Quantizer(kernel_set(format_name, "cpu")))
        self._count(scheme, "quantize_expert")
        loader = MoeOnlineWeightLoader(self.layer, scheme, on_finished=lambda *_: self._finish())
        return {name: loader.bound(name) for name in self.layer.weight_layouts}

    def _count(self, owner: Any, name: str) -> None:
        """Remember the shape of what a method is called with."""
        method = getattr(owner, name)

        def counted(values: Tensor, *args: Any, **more: Any) -> Any:
            self.calls.append(tuple(values.shape))
            return method(values, *args, **more)

        setattr(owner, name, counted)

    def _finish(self) -> None:
        self.finished += 1


def _tensors(stored: str, zeros: bool) -> Iterator[tuple[tuple[str, int, str], Tensor]]:
    fmt, generator = FORMATS[stored], torch.Generator().manual_seed(0)
    for kind, (rows, columns) in SHAPES.items():
        for expert in range(EXPERTS):
            codes = torch.randint(0x7F, fmt.code_shape(rows, columns), dtype=torch.uint8, generator=generator)
            yield (kind, expert, "codes"), codes.view(fmt.code_dtype)
            shape: Sequence[int] = fmt.scale_shape(rows, columns)
            if fmt.scale_dtype is torch.uint8:
                yield (kind, expert, "scale"), torch.randint(100, 140, shape, dtype=torch.uint8, generator=generator)
            else:
                yield (kind, expert, "scale"), torch.rand(shape, generator=generator) + 0.5
            if zeros:
                yield (kind, expert, "must_be_zero"), torch.zeros(1, dtype=torch.int8)
