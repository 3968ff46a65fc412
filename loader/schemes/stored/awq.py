"""AWQ in its GEMM layout: four bits, groups along K, the codes of eight rows of the weight in a word."""

from __future__ import annotations

from .integers import GROUPS, OF_4_BITS, awq
from .layers import Kept, Layer
from .patterns import Prefixes
from .settings import Settings


class Awq:
    """A checkpoint that AutoAWQ wrote, or AMD Quark for it."""

    method = "awq"
    tensors = frozenset({"qweight", "qzeros", "scales"})
    formats = OF_4_BITS

    def __init__(self, settings: Settings) -> None:
        settings.choice("bits", (4,))
        settings.choice("version", ("gemm", "GEMM"), "gemm")
        settings.choice("pack_method", ("reorder",), "reorder")
        group = settings.choice("group_size", (*GROUPS, -1))
        self._layer = Layer(awq(max(group, 0), settings.choice("zero_point", (True, False), True)))
        self._where = f"{settings.path}.modules_to_not_convert"
        self._kept = Prefixes(settings.strings("modules_to_not_convert"), self._where)

    def layer(self, module: str) -> Layer | Kept:
        """Every layer but those that the config names."""
        pattern = self._kept.first(module)
        return self._layer if pattern is None else Kept(f"{self._where} has {pattern!r}")
