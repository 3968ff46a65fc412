"""Layers of an engine that stay as a quantized checkpoint stores them: which of its weights are theirs, by name."""

from __future__ import annotations

import bisect
import functools
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import PolicyError
from ..model.stored_sources import ModuleWeights
from ..online.as_stored import StoredParameter, StoredProgress
from ..online.parameter import QuantizedParameter, alive
from ..schemes.base import LinearScheme, MoEScheme
from ..schemes.stored.weights import StoredWeight

ANY = "weight"
"""What stands for the parameters of a layer, whose weights are all stored alike."""
Finish = Callable[[None, Callable[[], None]], None]
"""Told that all has come: nothing was measured, and what brings the weights to where their kernel wants them."""


class StoredLayers:
    """The quantized weights of a checkpoint by the names of an engine's layers.

    `rename` makes of the name of a checkpoint tensor what the engine calls it; `None` for one that it drops.
    """

    def __init__(self, weights: Mapping[str, StoredWeight], rename: Callable[[str], str | None]) -> None:
        named = ((rename(name), weight) for name, weight in weights.items())
        self._weights = {name: weight for name, weight in named if name is not None}
        self._sorted = sorted(self._weights)

    def linear(self, names: Sequence[str]) -> list[ModuleWeights | None]:
        """Of linear layers, each for itself; `None` for one that is not quantized."""
        found = [self._weights.get(f"{name}.weight") for name in names]
        return [None if weight is None else ModuleWeights({ANY: [weight]}) for weight in found]

    def experts(self, prefix: str) -> ModuleWeights | None:
        """Of all experts below a name."""
        first = bisect.bisect(self._sorted, f"{prefix}.")
        names = itertools.takewhile(
            lambda name: name.startswith(f"{prefix}."), itertools.islice(self._sorted, first, None)
        )
        found = [self._weights[name] for name in names]
        return ModuleWeights({ANY: found}) if found else None


def together(kinds: Sequence[ModuleWeights | None]) -> ModuleWeights | None:
    """The weights of what an engine runs as one; `None` where a part is not quantized."""
    weights = [weight for kind in kinds if kind is not None for weight in kind.weights[ANY]]
    return ModuleWeights({ANY: weights}) if weights and None not in kinds else None


def stored_closures(
    module: nn.Module,
    scheme: LinearScheme | MoEScheme,
    stored: ModuleWeights,
    parameters: Mapping[str, QuantizedParameter],
    finish: Finish,
) -> tuple[StoredProgress, list[StoredParameter]]:
    """Closures that take codes and scales as they are; who loads has to keep them while it does.

    Raises `PolicyError` for static scales of activations, which come by no way that an engine has.
    """
    for key, parameter in parameters.items():
        if scheme.input_scale_name(key) in module._parameters:
            raise PolicyError(
                f"{parameter.full_name}: its inputs are quantized with a scale of the checkpoint, which engines do not "
                f"hand over: say activations='none' in quantization_config, and they are not"
            )
    first = stored.first
    made = [
        StoredParameter(parameter, stored.has_zero_points(ANY), first.zero_point, first.largest_scale)
        for parameter in parameters.values()
    ]
    process: Any = functools.partial(_process, weakref.ref(module), scheme)
    return StoredProgress(made, lambda: finish(None, process)), made


def _process(module: weakref.ref[nn.Module], scheme: LinearScheme | MoEScheme) -> None:
    scheme.process_weights_after_loading(alive(module))
