"""Conversions that coordinates cannot express: transformers' own operation on the tensors of one group, whole.

The group's tensors are read into memory of their own, converted, handed to the same closures, and freed. At most
`AT_ONCE` groups are in memory, however many threads read; the plan counts those, and the report says how many there
were in all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.crew import leave_if_stopping
from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import Piece
from ..checkpoint.workspace import Workspace
from ..errors import UnexpectedWeightsError
from ..geometry.regions import Region
from ..geometry.spans import Landing
from ..model import transformers_api
from ..model.routes import CheckpointMap, ModelShapes, targets
from ..model.transformers_api import Conversion
from ..online.sink import Sink

AT_ONCE = 2
"""Groups that may be in memory at the same time: one that is read while another is converted."""
_TICK = 0.1


class OpenGroups:
    """Keeps all groups but `AT_ONCE` waiting for memory. Their pieces come group by group, so that open ones end."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._changed = threading.Condition()

    def enter(self, group: WholeConversion) -> None:
        """A tensor of a group is about to take memory; waits for its turn, and leaves with the load."""
        with self._changed:
            while id(group) not in self._open and len(self._open) == AT_ONCE:
                leave_if_stopping()
                self._changed.wait(_TICK)
            self._open.add(id(group))

    def leave(self, group: WholeConversion) -> None:
        """The memory of a group is free."""
        with self._changed:
            self._open.discard(id(group))
            self._changed.notify_all()


class WholeConversion:
    """One group of checkpoint tensors on its way through a conversion."""

    def __init__(
        self,
        shapes: ModelShapes,
        conversion: Conversion,
        entries: Sequence[TensorEntry],
        sinks: Mapping[str, Sink],
        landing: Callable[[str], Landing],
        groups: OpenGroups | None = None,
    ) -> None:
        """`groups` are those that share the memory, where tensors are read into `target` from several threads."""
        self._shapes, self._conversion, self._sinks, self._landing = shapes, conversion, sinks, landing
        self._groups = groups or OpenGroups()
        self._entries = {entry.name: entry for entry in entries}
        self._tensors: dict[str, Tensor] = {}
        self._arrived = 0
        self._lock = threading.Lock()

    def target(self, name: str) -> Tensor:
        """The bytes of one source tensor, to be read into; waits while too many other groups are in memory."""
        self._groups.enter(self)
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with self._lock:
            self._tensors[name] = tensor
        return tensor.reshape(-1).view(torch.uint8)

    def arrived(self, _: Workspace) -> None:
        """A source tensor is complete; the last one sets the conversion off."""
        with self._lock:
            self._arrived += 1
            if self._arrived < len(self._entries):
                return
        try:
            self.run(self._tensors)
        finally:
            self._groups.leave(self)

    def run(self, sources: dict[str, Tensor]) -> None:
        """Convert all tensors of the group, which are let go, and hand on what comes of them."""
        # As transformers does it: converted in the dtype the parameter will have.
        wanted = self._shapes.tensors[self._conversion.target].dtype
        tensors = {name: tensor.to(wanted) for name, tensor in sources.items()}
        sources.clear()
        converted = transformers_api.convert(self._shapes, self._conversion, tensors)
        del tensors
        for name in list(converted):
            self._deliver(name, converted.pop(name))

    def _deliver(self, name: str, tensor: Tensor) -> None:
        sink = self._sinks.get(name)
        if sink is None:
            raise UnexpectedWeightsError(
                f"{self._conversion.target}: the conversion also makes {name}, which no parameter takes"
            )
        for region, matrix in _matrices(tensor, self._landing(name)):
            values = matrix.contiguous()
            if not sink.scales_are_local(region):
                sink.observe(values, region)
            sink.load_region(values, region)


def whole_bytes(conversion: Conversion, tensors: Mapping[str, TensorEntry], mapped: CheckpointMap) -> int:
    """Bytes a group holds at its highest.

    Its tensors as they are read and, where they have another dtype, as the parameter's; and twice what is made of
    them, once by the last operation and once by the one before it.
    """
    wanted = mapped.shapes.tensors[conversion.target].dtype
    sources = [tensors[name] for name in conversion.names()]
    cast = sum(entry.nbytes // entry.dtype.itemsize for entry in sources if entry.dtype != wanted) * wanted.itemsize
    made = sum(mapped.shapes.tensors[name].numel() for name in targets(mapped, conversion)) * wanted.itemsize
    return sum(entry.nbytes for entry in sources) + cast + 2 * made


def plan_whole(
    conversions: Sequence[Conversion],
    tensors: Mapping[str, TensorEntry],
    shapes: ModelShapes,
    sinks: Mapping[str, Sink],
    landing: Callable[[str], Landing],
) -> Iterator[Piece]:
    """The pieces of every group, one group after the other."""
    groups = OpenGroups()
    for conversion in conversions:
        entries = [tensors[name] for name in conversion.names()]
        group = WholeConversion(shapes, conversion, entries, sinks, landing, groups)
        for entry in entries:
            extents = ((entry.offset, entry.nbytes),)
            yield Piece(entry.shard, extents, group.arrived, target=lambda g=group, n=entry.name: g.target(n))  # type: ignore[misc]


def _matrices(tensor: Tensor, landing: Landing) -> Iterator[tuple[Region, Tensor]]:
    if landing.layout is None:
        yield Region(None, (0, landing.rows), (0, landing.columns)), tensor.reshape(landing.rows, landing.columns)
        return
    whole = (0, landing.rows), (0, landing.columns)
    tensor = tensor.transpose(-1, -2) if landing.transposed else tensor
    if landing.experts is None:
        yield Region(None, *whole), tensor
        return
    for expert in range(landing.experts):
        yield Region(expert, *whole), tensor[expert]
