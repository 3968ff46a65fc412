"""The log lines of a load, and the parser that turns them, or SGLang's, back into numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import QuantloadError
from ..progress import Moment
from .amounts import GIB

logger = logging.getLogger("quantload")

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BEFORE = rf"Peak\s+(GPU|CPU)\s+memory\s+before\s+loading\s+weights:\s+{_NUMBER}\s+GiB"
_INCREASE = rf"Memory\s+increase\s+during\s+load_weights:\s+{_NUMBER}\s+GiB"
_QUANTIZED = (
    r"Online\s+(\S+)\s+quantization:\s+quantized\s+(\d+)\s+layers\s+of\s+types:"
    r"\s*([\[{(][^\]})]{0,4000}[\]})]|set\(\))?"  # a list, set or tuple as Python prints it
)
_PEAK = (
    rf"Peak\s+(GPU|CPU)\s+memory\s+during\s+load_weights:\s+{_NUMBER}\s+GiB"
    rf"(?:\s+\(final\s+{_NUMBER}\s+GiB,\s+staging\s+{_NUMBER}\s+GiB\))?"
)
_LOADED = rf"Loaded\s+{_NUMBER}\s+GiB\s+in\s+{_NUMBER}\s+s\s+\({_NUMBER}\s+GiB/s\)"
_SGLANG_BEGIN = r"Load\s+weight\s+begin\."
# SGLang divides by 2**30 and writes GB. The fields between differ from release to release.
_SGLANG_END = rf"Load\s+weight\s+end\.\s+elapsed={_NUMBER}\s+s(?:,[^\n]{{0,500}}?\bmem\s+usage={_NUMBER}\s+GB)?"

_LINES = {
    name: re.compile(pattern)
    for name, pattern in (
        ("before", _BEFORE),
        ("increase", _INCREASE),
        ("quantized", _QUANTIZED),
        ("peak", _PEAK),
        ("loaded", _LOADED),
        ("begin", _SGLANG_BEGIN),
        ("end", _SGLANG_END),
    )
}
_ANY_LINE = re.compile("|".join(f"(?P<{name}>{line.pattern})" for name, line in _LINES.items()))
_RANK = re.compile(r"\[[^\]\n]*?\b((?:(?:DP|PP|TP|EP|CP)\d+)(?: (?:DP|PP|TP|EP|CP)\d+)*)\]")
_LONGEST_PREFIX = 300
WEIGHTS_SHOWN = 8
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


@dataclass(frozen=True)
class MemoryLog:
    """The numbers of one load's log lines; None for a line that was not there.

    Sizes are bytes, accurate to the digits of the log (0.0005 GiB). `kind` is `GPU` or `CPU`, `rank` what SGLang
    writes after the time on more than one device, such as `TP4` or `DP0 TP1`. Where a load used several schemes,
    `scheme` names them with commas between, `quantized_layers` is their sum and `layer_types` has the types of all.
    """

    kind: str | None = None
    rank: str | None = None
    peak_before_bytes: int | None = None
    increase_bytes: int | None = None
    peak_bytes: int | None = None
    final_bytes: int | None = None
    staging_bytes: int | None = None
    scheme: str | None = None
    quantized_layers: int | None = None
    layer_types: tuple[str, ...] | None = None
    loaded_bytes: int | None = None
    seconds: float | None = None
    bytes_per_second: float | None = None

    @property
    def reference_bytes(self) -> int | None:
        """The peak to hold against a limit: the measured one, or before + increase, as SGLang's tests compare it."""
        if self.peak_bytes is not None:
            return self.peak_bytes
        if self.peak_before_bytes is not None and self.increase_bytes is not None:
            return self.peak_before_bytes + self.increase_bytes
        return None


def log_before(kind: str, size: int) -> None:
    """Log the memory before the load (bytes); `kind` is `GPU` or `CPU`."""
    logger.info("Peak %s memory before loading weights: %s GiB", kind, _gib(size))


def log_increase(size: int) -> None:
    """Log the memory the load left behind (bytes, negative where it freed some)."""
    logger.info("Memory increase during load_weights: %s GiB", _gib(size))


def log_quantized(scheme: str, layers: int, types: Iterable[str]) -> None:
    """Log how many layers of which types (see `layer_types`) `scheme` quantized."""
    logger.info("Online %s quantization: quantized %d layers of types: %s", scheme, layers, sorted(set(types)))


def log_prequantized(format_name: str, layers: int, types: Iterable[str]) -> None:
    """Log how many layers were copied as the checkpoint stores them, and the types among them."""
    logger.info("Pre-quantized %s: kept %d layers of types: %s", format_name, layers, sorted(set(types)))


def log_peak(kind: str, peak: int, final: int, staging: int) -> None:
    """Log peak, final and staging sizes (bytes); `kind` is `GPU` or `CPU`."""
    logger.info(
        "Peak %s memory during load_weights: %s GiB (final %s GiB, staging %s GiB)",
        kind,
        _gib(peak),
        _gib(final),
        _gib(staging),
    )


def log_non_finite(weights: Sequence[object]) -> None:
    """Warn about weights that were loaded with NaN or infinities in them; they say themselves which and how many."""
    if weights:
        more = f" and {len(weights) - WEIGHTS_SHOWN} more" if len(weights) > WEIGHTS_SHOWN else ""
        named = "; ".join(map(str, weights[:WEIGHTS_SHOWN]))
        logger.warning(
            "Weights that are not finite: %s%s; what the model computes with them will not be either. --strict "
            "(strict=True) refuses such a checkpoint",
            named,
            more,
        )


def log_progress(moment: Moment) -> None:
    """Log how far a load is, where nobody looks at a bar."""
    rate = moment.bytes_read / moment.seconds / GIB if moment.seconds > 0 else 0.0
    allowed = moment.limit_bytes or moment.predicted_peak_bytes
    logger.info(
        "Loading: %.2f of %.2f GiB read in %.0f s (%.2f GiB/s), memory %.2f of %.2f GiB",
        *(moment.bytes_read / GIB, moment.bytes_total / GIB, moment.seconds, rate),
        *(max(0, moment.memory) / GIB, allowed / GIB),
    )


def log_converted(kind: str, peak: int, read: int, written: int, seconds: float) -> None:
    """Log the peak of a conversion, whose result is never in memory whole, and bytes of weights read and written."""
    logger.info("Peak %s memory during conversion: %s GiB", kind, _gib(peak))
    rate = read / seconds / GIB if seconds > 0 else 0.0
    logger.info("Converted %.2f GiB to %.2f GiB in %.1f s (%.2f GiB/s)", read / GIB, written / GIB, seconds, rate)


def log_loaded(size: int, seconds: float) -> None:
    """Log the bytes read, the seconds it took and the rate."""
    rate = size / seconds / GIB if seconds > 0 else 0.0
    logger.info("Loaded %.2f GiB in %.1f s (%.2f GiB/s)", size / GIB, seconds, rate)


def layer_types(names: Iterable[str]) -> list[str]:
    """Sorted last parts of module names, numbers skipped: `model.layers.0.mlp.down_proj` is a `down_proj`."""
    types = set()
    for name in names:
        words = [part for part in name.split(".") if not part.isdigit()]
        types.add(words[-1] if words else name)
    return sorted(types)


def parse(text: str) -> MemoryLog:
    """The numbers of the last load in `text`, a log of quantload or SGLang, whatever is written before each line.

    Where several ranks logged, it is the last load of the rank with the highest peak, the one that runs out of memory
    first. Raises `QuantloadError` for text without any of the lines. `parse_all` gives every load.
    """
    last = {load.rank: load for load in parse_all(text)}
    if not last:
        raise QuantloadError(
            "no load in this log: none of its lines reads like 'Memory increase during load_weights: 5.755 GiB';"
            " log at INFO (SGLang: --log-level debug) and give the whole text"
        )
    return max(last.values(), key=lambda load: load.reference_bytes or load.increase_bytes or 0)


def parse_all(text: str) -> tuple[MemoryLog, ...]:
    """Every load in `text`, in the order they began; empty where there is none.

    A load begins at its `before` line, at SGLang's `Load weight begin.`, or where a line appears that the load already
    has (the line of another scheme excepted); lines of different ranks belong to different loads.
    """
    open_loads: dict[str | None, tuple[int, set[str]]] = {}
    loads: list[dict[str, Any]] = []
    for match in _ANY_LINE.finditer(text):
        name = match.lastgroup or ""
        near = max(0, match.start() - _LONGEST_PREFIX)
        line_start = text.rfind("\n", near, match.start()) + 1 or near
        tag = _RANK.search(text, line_start, match.start())
        rank = tag[1] if tag else None
        index, seen = open_loads.get(rank, (-1, set()))
        fields = _fields(name, match)
        name = f"quantized {fields['scheme']}" if name == "quantized" else name
        if index < 0 or name in seen or name == "begin" or (name == "before" and seen - {"begin"}):
            index, seen = len(loads), set()
            loads.append({"rank": rank})
            open_loads[rank] = (index, seen)
        seen.add(name)
        if "scheme" in fields:
            fields = _merged(loads[index], fields)
        if name == "end":  # what SGLang's own lines say more exactly is kept
            fields = {key: value for key, value in fields.items() if key not in loads[index]}
        loads[index].update(fields)
    return tuple(MemoryLog(**fields) for fields in loads if set(fields) != {"rank"})


def _fields(name: str, match: re.Match[str]) -> dict[str, Any]:
    line = _LINES[name].fullmatch(match[name])
    values = line.groups() if line else ()
    if name == "before":
        return {"kind": values[0], "peak_before_bytes": _bytes(values[1])}
    if name == "increase":
        return {"increase_bytes": _bytes(values[0])}
    if name == "quantized":
        types = tuple(single or double for single, double in _QUOTED.findall(values[2] or ""))
        return {"scheme": values[0], "quantized_layers": int(values[1]), "layer_types": types}
    if name == "peak":
        sizes = zip(("peak_bytes", "final_bytes", "staging_bytes"), values[1:], strict=True)
        return {"kind": values[0]} | {key: _bytes(size) for key, size in sizes if size is not None}
    if name == "loaded":
        return {
            "loaded_bytes": _bytes(values[0]),
            "seconds": float(values[1]),
            "bytes_per_second": float(values[2]) * GIB,
        }
    if name == "end":
        used = {} if values[1] is None else {"increase_bytes": _bytes(values[1])}
        return {"seconds": float(values[0])} | used
    return {}


def _merged(load: Mapping[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    if "scheme" not in load:
        return line
    return {
        "scheme": f"{load['scheme']}, {line['scheme']}",
        "quantized_layers": load["quantized_layers"] + line["quantized_layers"],
        "layer_types": tuple(dict.fromkeys(load["layer_types"] + line["layer_types"])),
    }


def _gib(size: int) -> str:
    text = f"{size / GIB:.3f}"
    return "0.000" if text == "-0.000" else text


def _bytes(gib: str) -> int:
    return round(float(gib) * GIB)
