"""What so many weights take in each scheme, from the formats alone: scales and zero points included."""

from __future__ import annotations

from markdown import markdown
from quantload.kernels.formats import WeightFormat
from quantload.schemes.support import support_matrix

BILLIONS = (1, 8, 30, 70, 120)
_ROWS = _COLUMNS = 4096
_GIB = 1 << 30


def bits_of(fmt: WeightFormat) -> float:
    """Bits of a weight in a matrix of 4096 x 4096."""
    nbytes = 0
    for tensor in fmt.tensors:
        count = 1
        for size in tensor.shape(_ROWS, _COLUMNS):
            count *= size
        nbytes += count * tensor.dtype.itemsize
    return 8 * nbytes / (_ROWS * _COLUMNS)


def render() -> str:
    """The schemes that have one format for all layers, and BF16, as Markdown."""
    bits: dict[str, float] = {}
    for row in support_matrix():
        if row.online and len(row.formats) == 2 and len(set(row.formats.values())) == 1:
            bits[f"`{row.name}`"] = bits_of(next(iter(row.formats.values())))
    bits["`none` (BF16)"] = 16.0
    by_bits: dict[str, list[str]] = {}
    for name, each in sorted(bits.items(), key=lambda pair: pair[1]):
        by_bits.setdefault(f"{each:.2f}", []).append(name)
    cells = [[", ".join(names), number, *_sizes(float(number))] for number, names in by_bits.items()]
    return markdown(cells, ("scheme", "bits/weight", *(f"{number}B: GiB" for number in BILLIONS)))


def _sizes(bits: float) -> list[str]:
    return [f"{number * 1e9 * bits / 8 / _GIB:.1f}" for number in BILLIONS]
