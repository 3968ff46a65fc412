"""What a model would take with the other schemes, from the sizes in its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Bits of a linear and of an experts weight, scales included: by the shapes of the formats in `kernels/formats.py`,
# where a test looks them up. Scales of a row or of a tensor are left out: they are a hundredth of a bit.
BITS: dict[str, tuple[float, float]] = {
    "quark_mxfp4": (4.25, 4.25),
    "mxfp4_rows": (4.25, 4.25),
    "int4_per_group": (4.25, 4.25),
    "nl4": (4.25, 4.25),
    "nvfp4": (4.5, 4.5),
    "quark_int4fp8_moe": (8.0, 4.0),
    "mxfp6_e2m3": (6.25, 6.25),
    "mxfp6_e3m2": (6.25, 6.25),
    "experts_int8": (16.0, 8.0),
    "fp8_per_tensor": (8.0, 8.0),
    "fp8_per_channel": (8.0, 8.0),
    "fp8_per_block": (8.0, 8.0),
    "int8_per_channel": (8.0, 8.0),
    "mxfp8": (8.25, 8.25),
}
SIXTEEN_BITS = "none"


@dataclass(frozen=True)
class Cost:
    """What a model takes with a scheme, and the peak of loading it so, in bytes; of `is_this` both were measured."""

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
    elements = {
        kind: sum(layer["numel"] for layer in layers if layer["kind"] == kind) for kind in ("linear", "experts")
    }
    yield Cost(report["quantization"], final, report["peak_bytes"], is_this=True)
    for scheme, (linear, experts) in [*BITS.items(), (SIXTEEN_BITS, (16.0, 16.0))]:
        if scheme != report["quantization"]:
            about = rest + round((elements["linear"] * linear + elements["experts"] * experts) / 8)
            yield Cost(scheme, about, about + beside)
