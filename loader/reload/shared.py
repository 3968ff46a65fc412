"""Parameters that the model ties to each other, and a reload that brings values for both or for one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..geometry.regions import Region
from ..online.sink import InPlace
from ..online.weight_loader import DirectWeightLoader
from ..schemes.opaque import plain


class SameValues(DirectWeightLoader):
    """Takes values of a parameter that another has brought already: they must be what is there."""

    def __init__(self, loader: DirectWeightLoader, other: str) -> None:
        self._loader, self._other, self.is_buffer = loader, other, loader.is_buffer
        self.values_dtype, self.columns, self.rows = loader.values_dtype, loader.columns, loader.rows
        self.tracker = loader.tracker

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """Never: what is there is to be compared."""
        return None

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """Raise `CheckpointError` where the values differ from those that are there."""
        held = self._loader.values(region)
        if not torch.equal(held, loaded_weight.to(held.device, held.dtype)):
            raise CheckpointError(
                f"{self.name} and {self._other} are one tensor in the model, and the new weights have different values "
                f"for them: load the model anew for each to keep its own"
            )
        self.tracker.claim(region)
        self.tracker.commit(region.numel)


class Twins:
    """Pairs of parameters that share their memory: what comes for the one must be what came for the other."""

    def __init__(self, pairs: Mapping[str, str], sinks: Mapping[str, Any]) -> None:
        self._other = {**pairs, **{other: name for name, other in pairs.items()}}
        self._sinks = sinks

    def brought(self, sink: DirectWeightLoader, region: Region, values: Tensor) -> bool:
        """Whether the other of a pair has brought a region; raises `CheckpointError` where its values are different."""
        other = self._other.get(sink.name)
        if other is None or not self._sinks[other].tracker.arrived(region):
            return False
        SameValues(sink, other).load_region(values, region)
        return True

    def fill(self) -> None:
        """Count as complete what the other of a pair has brought."""
        for name, other in self._other.items():
            mine, its = self._sinks[name], self._sinks[other]
            if its.tracker.complete and not mine.tracker.complete:
                mine.reset()
                mine.restored(None)


def ties(model: Any) -> Iterator[tuple[str, str]]:
    """The pairs that the class of a model ties: a parameter, and the one that it gets its values from."""
    yield from getattr(model, "all_tied_weights_keys", {}).items()


def are_one(tensors: Mapping[str, Any], name: str, other: str) -> bool:
    """Whether two parameters share their memory."""
    if name not in tensors or other not in tensors:
        return False
    first, second = plain(tensors[name]), plain(tensors[other])
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


def shared_pairs(skeleton: nn.Module, model: nn.Module, sinks: Mapping[str, Any]) -> dict[str, str]:
    """The pairs that share their memory in a model, where both have a closure."""
    tensors = model.state_dict(keep_vars=True)
    return {
        name: other for name, other in ties(skeleton) if {name, other} <= sinks.keys() and are_one(tensors, name, other)
    }


@torch.no_grad()
def fill_tied(skeleton: nn.Module, model: nn.Module, missing: set[str]) -> None:
    """Give tied parameters that have memory of their own, and no new values, those of the one they are tied to."""
    tensors = model.state_dict(keep_vars=True)
    for name, other in ties(skeleton):
        if name in missing and other not in missing and name in tensors and not are_one(tensors, name, other):
            plain(tensors[name]).data.copy_(plain(tensors[other]))
