"""What a model would take with the other schemes, from the sizes in its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .elements import Markup, element, prose, table
from .numbers import size
from .sections import section

# Of a linear and of an experts weight: bits of an element, those of scales of blocks included, and bytes of a row. By
# the shapes of the formats in `kernels/formats.py`, where a test looks them up; scales of a whole matrix are left out.
BITS: dict[str, tuple[tuple[float, int], tuple[float, int]]] = {
    "quark_mxfp4": ((4.25, 0), (4.25, 0)),
    "mxfp4_rows": ((4.25, 4), (4.25, 4)),
    "int4_per_group": ((4.25, 0), (4.25, 0)),
    "nl4": ((4.25, 4), (4.25, 4)),
    "nvfp4": ((4.5, 0), (4.5, 0)),
    "quark_int4fp8_moe": ((8.0, 0), (4.0, 8)),
    "mxfp6_e2m3": ((6.25, 0), (6.25, 0)),
    "mxfp6_e3m2": ((6.25, 0), (6.25, 0)),
    "experts_int8": ((16.0, 0), (8.0, 4)),
    "fp8_per_tensor": ((8.0, 0), (8.0, 0)),
    "fp8_per_channel": ((8.0, 4), (8.0, 4)),
    "fp8_per_block": ((8.001953125, 0), (8.001953125, 0)),
    "int8_per_channel": ((8.0, 4), (8.0, 4)),
    "mxfp8": ((8.25, 0), (8.25, 0)),
}
SIXTEEN_BITS = "none"


@dataclass(frozen=True)
class Cost:
    """What a model takes with a scheme, and the predicted peak of loading it so, in bytes."""

    scheme: str
    final_bytes: int
    peak_bytes: int
    is_this: bool = False


def costs(report: Mapping[str, Any]) -> list[Cost]:
    """From the smallest to the largest; what was kept as stored stays so. None where nothing was quantized."""
    return sorted(_costs(report), key=lambda cost: cost.final_bytes)


def _costs(report: Mapping[str, Any]) -> Iterator[Cost]:
    layers, final = report["layers"], report["final_bytes"]
    if not layers:
        return
    beside = max(0, report["predicted_peak_bytes"] - report["predicted_final_bytes"])
    rest = final - sum(layer["bytes_out"] for layer in layers)
    numel, rows = _of_kinds(layers, "numel"), _of_kinds(layers, "rows")
    schemes = {layer["scheme"] for layer in layers}
    own = schemes | {report["quantization"]} if len(schemes) == 1 else set()  # one for all is another than several
    yield Cost(report["quantization"], final, final + beside, is_this=True)
    for scheme, kinds in [*BITS.items(), (SIXTEEN_BITS, ((16.0, 0), (16.0, 0)))]:
        if scheme not in own:
            sizes = zip(numel, rows, kinds, strict=True)
            about = rest + sum(round(weights * bits / 8) + count * row for weights, count, (bits, row) in sizes)
            yield Cost(scheme, about, about + beside)


def _of_kinds(layers: Iterable[Mapping[str, Any]], key: str) -> tuple[int, int]:
    """The sum over linear layers, embeddings among them, and that over experts; old reports have no rows."""
    found = [0, 0]
    for layer in layers:
        found[layer["kind"] == "experts"] += layer[key] or 0
    return found[0], found[1]


def other_schemes(report: Mapping[str, Any]) -> Markup:
    """What the model would take otherwise."""
    heading = "What other schemes would take"
    found = costs(report)
    if not found:
        said = "Nothing was quantized. `quantload compare MODEL` says what each scheme would take, and lose."
        return section(heading, element("p", prose(said)), name="schemes")
    count = len({layer["scheme"] for layer in report["layers"]})
    this = f"this load, {count} schemes" if count > 1 else f"{report['quantization']} (this load)"
    rows = [
        (element("strong", this) if each.is_this else each.scheme, size(each.final_bytes),
         size(each.peak_bytes), "" if each.is_this else _difference(each.final_bytes, report["final_bytes"]))
        for each in found
    ]  # fmt: skip
    measured = (
        f"All peaks here are predicted, also that of this load, whose measured peak was {size(report['peak_bytes'])}"
    )
    return section(
        heading,
        element("p", f"{measured}: a load seldom needs all of what is set aside for threads and buffers. ",
                prose(OTHER_SCHEMES)),
        table("Schemes by size", ("scheme", "model", "predicted peak", "model, beside this one"), rows),
        name="schemes",
    )  # fmt: skip


OTHER_SCHEMES = (
    "Each scheme is taken for all modules that are quantized here; what is kept as stored stays so. "
    "`quantload compare MODEL` has the same sizes, to the byte, and what each scheme is expected to lose."
)


def _difference(other: int, this: int) -> str:
    nbytes = other - this
    if abs(nbytes) < this / 100:
        return "about the same"
    sign = "+" if nbytes > 0 else "\N{MINUS SIGN}"
    return f"{sign}{size(abs(nbytes))}"
