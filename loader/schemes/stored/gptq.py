"""GPTQ: four or eight bits, groups along K, the codes of successive columns of the weight in a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .fields import GPTQ_MODULE
from .integers import GROUPS, OF_4_BITS, OF_8_BITS, gptq
from .layers import Kept, Layer
from .patterns import Patterns
from .settings import Settings

_KEPT, _OTHER = "-:", "+:"
_FIRST_ZERO = {"gptq": 1, "gptq_v2": 0}
"""What a stored zero point of 0 stands for, by `checkpoint_format`."""


class Gptq:
    """A checkpoint that AutoGPTQ or GPTQModel wrote.

    `dynamic` holds regular expressions for the start of a module's name: behind `-:` for modules that are kept, behind
    `+:` or nothing for those with other bits or groups; the first that fits counts.
    """

    method = "gptq"
    tensors = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    formats = OF_4_BITS | OF_8_BITS

    def __init__(self, settings: Settings) -> None:
        settings.choice("is_marlin_format", (False,), False)
        self._first_zero = _FIRST_ZERO[settings.choice("checkpoint_format", tuple(_FIRST_ZERO), "gptq")]
        self._layer = self._read(settings, {})
        self._dynamic = dict(self._overrides(settings))
        self._where = f"{settings.path}.dynamic"
        self._patterns = Patterns(self._dynamic, self._where, meaning=_expression)

    def layer(self, module: str) -> Layer | Kept:
        """Every layer with GPTQ's tensors has the bits and groups of the config, or of what `dynamic` says."""
        pattern = self._patterns.first(module)
        layer = self._layer if pattern is None else self._dynamic[pattern]
        return Kept(f"{self._where} has {pattern!r}") if layer is None else layer

    def _overrides(self, settings: Settings) -> Iterator[tuple[str, Layer | None]]:
        defaults = {name: settings.get(name) for name in ("bits", "group_size", "desc_act")}
        for pattern, other in settings.sections("dynamic"):
            if other is not None:
                other.known(GPTQ_MODULE)
            yield pattern, None if other is None or pattern.startswith(_KEPT) else self._read(other, defaults)

    def _read(self, settings: Settings, defaults: dict[str, Any]) -> Layer:
        bits = settings.choice("bits", (4, 8), defaults.get("bits"))
        group = settings.choice("group_size", (*GROUPS, -1), defaults.get("group_size"))
        ordered = settings.choice("desc_act", (True, False), defaults.get("desc_act", False))
        return Layer(gptq(bits, max(group, 0), self._first_zero, ordered))


def _expression(pattern: str) -> tuple[str, ...]:
    return (f"re:{pattern.removeprefix(_KEPT).removeprefix(_OTHER)}",)
