"""Several blocks of 32 codes that are decoded together, for activations in an order that suits them, in vector IR.

Nothing has to be spread or brought into order for each row then: activations are, once for all rows (`arrange`). Blocks
that are left over at the end of a row, and their activations, stand as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from llvmlite import ir
from numba import types

from .vector import I16, I64, Codegen, Vector, count_to, emitted, load, store

WORDS = 32
"""BF16 activations in a vector, and codes of a block."""
X_BYTES = 2 * WORDS


@dataclass(frozen=True)
class Wide:
    """How some blocks are decoded together: to one vector for each of them, and the scales of sums of pairs."""

    order: str
    """Of the activations; it says how many blocks are decoded together (`BLOCKS`)."""
    code_bytes: int
    """Of all of them."""
    factors: Callable[[ir.IRBuilder, Any, ir.Value], list[Vector]]
    """(builder, what `table` or the segment made, address of the codes) -> BF16 bits."""
    table: Callable[[ir.IRBuilder], Any] | None = None
    """What codes are looked up in, the same for all rows; None: what the `segment` of the decoder makes."""
    scales: Callable[[ir.IRBuilder, ir.Value], Vector] | None = None
    """(builder, address of the scale of the first block) -> float32 [16] factors of sums; None: segments have one."""

    @property
    def blocks(self) -> int:
        return BLOCKS[self.order]


BLOCKS = {"words": 4, "bytes": 2}
"""Blocks that are decoded together, by the order of their activations.

`words`: vector n has those of the codes 4i + n, so lanes 4i to 4i + 3 of sums of pairs belong to block i.
`bytes`: of 16 activations each, the first vector has the first eight, and the second the others; lanes 8i to 8i + 7 of
sums of pairs belong to block i.
"""


def _words(b: ir.IRBuilder, x: ir.Value) -> list[Vector]:
    words = load(b, x, I64, WORDS)
    return [(words >> (16 * number) if number else words).trunc(I16) for number in range(BLOCKS["words"])]


def _bytes(b: ir.IRBuilder, x: ir.Value) -> list[Vector]:
    pairs = load(b, x, I64, 2 * 8)
    return [pairs.shuffle([4 * chunk + 2 * half + k for chunk in range(4) for k in (0, 1)]) for half in (0, 1)]


_ORDERS: Mapping[str, Callable[[ir.IRBuilder, ir.Value], Sequence[Vector]]] = MappingProxyType(
    {"words": _words, "bytes": _bytes}
)


@emitted
def arrange(typing: Any, x: Any, out: Any, blocks: Any, order: Any) -> tuple[Any, Codegen]:
    """Bring BF16 activations of a row of so many blocks of 32 into a literal `order`; those left over stay."""
    name = str(order.literal_value)
    together = BLOCKS[name]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, out, blocks, _ = args
        whole = b.udiv(blocks, I64(together))
        with count_to(b, whole) as number:
            at = b.mul(number, I64(X_BYTES * together))
            for place, vector in enumerate(_ORDERS[name](b, b.add(x, at))):
                store(vector, b.add(out, b.add(at, I64(X_BYTES * place))))
        done = b.mul(whole, I64(together))
        with count_to(b, b.sub(blocks, done)) as block:
            at = b.mul(b.add(done, block), I64(X_BYTES))
            store(load(b, b.add(x, at), I16, WORDS), b.add(out, at))
        return context.get_dummy_value()

    return types.void(x, out, blocks, order), codegen
