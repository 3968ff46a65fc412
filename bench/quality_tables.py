"""What `quality.py` found, as tables: every variant, the best of each size, and the SQNR of the formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from goals import columns
from markdown import markdown
from quantload.schemes.support import support_matrix

BASELINE = "BF16 (transformers)"
Result = Mapping[str, Any]
Table = Callable[[Sequence[Sequence[str]], Sequence[str]], str]


@dataclass(frozen=True)
class Variant:
    """A scheme, a scale mode and what activations are rounded to, on the demo model.

    `divergence` is in nats a token. `bits_per_weight` (scales and padding included) and `sqnr_db`, which is weighted by
    elements, are those of the quantized modules.
    """

    scheme: str
    scale_mode: str
    activations: str
    perplexity: float
    change: float
    divergence: float
    bits_per_byte: float
    bits_per_weight: float | None
    final_bytes: int
    sqnr_db: float | None
    quantized_modules: int

    @property
    def name(self) -> str:
        """The scheme, and what is not as usual."""
        scales = "" if self.scale_mode == "default" else f", {self.scale_mode} scales"
        return self.scheme + scales + ("" if self.activations == "none" else f", {self.activations} activations")


def variants_of(result: Result) -> list[Variant]:
    """The variants of a result file."""
    return [Variant(**row) for row in result["variants"]]


def best_of_each_size(variants: Sequence[Variant]) -> list[tuple[int, list[Variant]]]:
    """(whole bits a weight, variants of that size with the least divergence first), the smallest first.

    Only what leaves activations alone and quantizes as many modules as any variant does: the sizes compare.
    """
    most = max(variant.quantized_modules for variant in variants)
    sizes: dict[int, list[Variant]] = {}
    for variant in sorted(variants, key=lambda variant: variant.divergence):
        comparable = variant.activations == "none" and variant.quantized_modules == most
        if comparable and variant.bits_per_weight is not None:
            sizes.setdefault(math.floor(variant.bits_per_weight), []).append(variant)
    return sorted(sizes.items())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _variants(result: Result, table: Table) -> str:
    cells = [
        [
            row.name,
            _number(row.bits_per_weight, ".2f"),
            f"{row.perplexity:.3f}",
            f"{row.change:+.2%}",
            f"{1000 * row.divergence:.3f}",
            _number(row.sqnr_db, ".2f"),
            f"{row.final_bytes / 1e6:.2f}",
            str(row.quantized_modules),
        ]
        for row in variants_of(result)
    ]
    header = ("scheme", "bits/weight", "perplexity", "change", "divergence", "SQNR dB", "MB", "quantized modules")
    return table(cells, header)


def _best(result: Result, table: Table) -> str:
    cells = []
    for bits, (first, *others) in best_of_each_size(variants_of(result)):
        cells.append(
            [
                str(bits),
                first.name,
                _number(first.bits_per_weight, ".2f"),
                f"{1000 * first.divergence:.3f}",
                f"{first.change:+.2%}",
                "; ".join(f"{other.name} {1000 * other.divergence:.3f}" for other in others) or "-",
            ]
        )
    return table(cells, ("bits", "best", "bits/weight", "divergence", "perplexity", "then"))


def _choice(result: Result, table: Table) -> str:
    """Each scheme as it is made by default, the nearest to BF16 first; who else reads it."""
    written = {row.name: list(row.written_as) for row in support_matrix()}
    usual = [row for row in variants_of(result) if (row.scale_mode, row.activations) == ("default", "none")]
    cells = [
        [
            f"`{row.scheme}`",
            _number(row.bits_per_weight, ".2f"),
            f"{1000 * row.divergence:.3f}",
            f"{row.change:+.2%}",
            ", ".join(written[row.scheme]) or "-",
        ]
        for row in sorted(usual, key=lambda row: (row.bits_per_weight or 0, row.divergence))
        if row.bits_per_weight is not None
    ]
    return table(cells, ("scheme", "bits/weight", "divergence", "perplexity", "`convert` writes it as"))


def _sqnr(result: Result, table: Table) -> str:
    rows = result["sqnr"]
    by_key = {(row["format"], row["scale_mode"], row["distribution"]): row for row in rows}
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    cells = []
    for name in dict.fromkeys(row["format"] for row in rows):
        line = [name, f"{by_key[name, 'default', distributions[0]]['bits_per_weight']:.2f}"]
        for distribution in distributions:
            usual, least = (by_key.get((name, mode, distribution)) for mode in ("default", "mse"))
            assert usual is not None
            line += [f"{usual['db']:.2f}", "" if least is None else f"{least['db'] - usual['db']:+.2f}"]
        cells.append(line)
    return table(cells, ("format", "bits", *(name for each in distributions for name in (each, "mse"))))


def render_variants(result: Result) -> str:
    """Every variant as Markdown; divergences in thousandths of a nat."""
    return _variants(result, markdown)


def render_best(result: Result) -> str:
    """The best of each size as Markdown."""
    return _best(result, markdown)


def render_choice(result: Result) -> str:
    """Each scheme by its size as Markdown, with the checkpoints that can be written of it."""
    return _choice(result, markdown)


def render_sqnr(result: Result) -> str:
    """SQNR as Markdown: formats down, distributions across, each with what the least squared error adds."""
    return _sqnr(result, markdown)


def print_variants(result: Result) -> None:
    """Every variant."""
    print("\nDemo model on the held-out text; divergence in thousandths of a nat a token")
    print(_variants(result, columns))


def print_best(result: Result) -> None:
    """The best of each size."""
    print("\nBest at each size, by divergence")
    print(_best(result, columns))


def print_sqnr(result: Result) -> None:
    """SQNR, then the expected values."""
    print("\nSQNR in dB of BF16 weights; mse: what scales of the least squared error add")
    print(_sqnr(result, columns))
    for row in result["sqnr"]:
        if row["expected_db"] is not None:
            verdict = "met" if row["met"] else "NOT met"
            said = f"{row['format']} on {row['distribution']}: {row['db']:.2f}, expected {row['expected_db']:.1f}"
            print(f"{said}: {verdict}")
    off = max(abs(row["db"] - row["kernel_db"]) for row in result["sqnr"])
    print(f"largest difference to the kernels' own statistics: {off:.4f} dB")
