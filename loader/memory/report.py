"""What one load did: the report users save, compare and scrape, and its JSON form."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from ..errors import PolicyError
from .amounts import format_bytes
from .html import small_table

if TYPE_CHECKING:
    import torch

ModuleKind = Literal["linear", "experts", "embedding"]
LoadState = Literal["complete", "incomplete"]
"""`incomplete`: a reload has failed part-way, and the forward of the model raises until another has repaired it."""
ReportTable = Literal["layers", "kept", "timeline", "phases"]
CacheResult = Literal["hit", "written", "rebuilt", "unwritten"]
"""`hit`: read from an entry of the cache. `written`: read from the checkpoint, and an entry was made of it. `rebuilt`:
so too, as the entry there was damaged. `unwritten`: read from the checkpoint; the log says why no entry was made."""


MOST_BYTES = 256 << 20
"""Largest file that is read as a report; one of 50,000 layers has 20 MB."""
NAMES_SHOWN = 5
_GIVE = "give a file that --report, or `LoadReport.save` in Python, wrote"
_PLAIN: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}


@dataclass(frozen=True)
class LayerReport:
    """One quantized module: sizes in bytes, error of its weights.

    `format` is what its weights are in memory. The five statistics are None with `--stats off`, and for codes that were
    copied from a quantized checkpoint (`scheme` is `prequantized`), whose originals nobody here has seen.

    `sqnr_db` may be infinite (exact) or NaN (all zeros); both are null in JSON. `saturated_fraction` and
    `zero_fraction` are shares of its elements that were clamped to the largest code, or have a zero for a code.
    `divergence` is how far the model's predictions are, in nats a token, from those with this module as it was stored:
    None unless somebody has measured that (`LoadReport.note_divergence`). `rows` are those of its matrices, of all
    experts together: some formats have a scale for each.
    """

    name: str
    kind: ModuleKind
    scheme: str
    kernel: str
    bytes_in: int
    bytes_out: int
    numel: int
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    amax: float | None = None
    saturated_fraction: float | None = None
    zero_fraction: float | None = None
    format: str | None = None
    divergence: float | None = None
    rows: int | None = None

    @classmethod
    def from_statistics(
        cls,
        statistics: torch.Tensor | Sequence[float],
        *,
        name: str,
        kind: ModuleKind,
        scheme: str,
        kernel: str,
        bytes_in: int,
        bytes_out: int,
        numel: int,
        format: str | None = None,
        rows: int | None = None,
    ) -> Self:
        """A layer's line from what its kernel gathered.

        `statistics` is the float64 vector of `kernels/statistics.py`: element count, sum x^2, sum (x - q)^2,
        max |x - q|, max |x|, saturated count, zero-code count. Raises `ValueError` for another length.
        """
        import torch  # here, so that reading a report does not take the seconds torch needs

        from ..kernels import statistics as index

        if len(statistics) != index.STATS:
            raise ValueError(f"statistics of {name} have {len(statistics)} accumulators; {index.STATS} are expected")
        vector = torch.as_tensor(statistics, dtype=torch.float64)
        values: list[float] = vector.tolist()
        count = values[index.COUNT]
        return cls(
            name=name,
            kind=kind,
            scheme=scheme,
            kernel=kernel,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            numel=numel,
            sqnr_db=index.sqnr_db(vector),
            max_abs_error=values[index.MAX_ERROR],
            amax=values[index.AMAX],
            saturated_fraction=values[index.SATURATED] / count if count else 0.0,
            zero_fraction=values[index.ZERO] / count if count else 0.0,
            format=format,
            rows=rows,
        )


@dataclass(frozen=True)
class KeptReport:
    """A linear or experts module left as stored, with the reason and its bytes."""

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class NonFiniteReport:
    """A weight with values that are not finite, and how many: NaN, infinite, or so only in the dtype of the model.

    `first` is the index of the first of them. Weights that are quantized have none but the last kind: what their codes
    stand for lies beyond the float16 that the model computes in.
    """

    name: str
    nan: int
    infinite: int
    overflowed: int
    first: list[int]

    def __str__(self) -> str:
        kinds = (("NaN", self.nan), ("infinite", self.infinite), ("infinite in the model's dtype", self.overflowed))
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds if count)
        return f"{self.name} ({counts}; the first at {self.first})"


@dataclass(frozen=True)
class RequestsReport:
    """How many requests to a server ended so: `ok`, or what went wrong."""

    result: str
    count: int


@dataclass(frozen=True)
class TimelinePoint:
    """One moment of a load: seconds since its start, bytes read so far, memory above the baseline (bytes)."""

    seconds: float
    bytes_read: int
    memory: int


@dataclass(frozen=True)
class FitRow:
    """What was chosen for a kind of module in a third of the layers: how many modules have a scheme, the bytes of their
    weights, and their share of the expected loss."""

    kind: str
    third: str
    scheme: str
    modules: int
    bytes: int
    share_of_loss: float


@dataclass(frozen=True)
class FitReport:
    """Which schemes were chosen to stay below `size` bytes, where that was asked for; sizes in bytes.

    `of` is what was to stay below it, `planned_bytes` what that is planned to take. `expected_loss` is the divergence
    of the output from that of the stored model, in nats a token, as far as it is known without data. Where the size
    was `auto`: `available_bytes` were free, of which `reserve_bytes` were left, and `cache_bytes` for the attention
    cache of `requests` sequences of `context` tokens. `policy` are the fields of a `QuantizationPolicy`, `sensitivity`
    is what was measured of kinds of modules by depth, where it was.
    """

    size: int
    of: str
    final_bytes: int
    planned_bytes: int
    expected_loss: float
    available_bytes: int | None = None
    reserve_bytes: int = 0
    cache_bytes: int = 0
    context: int | None = None
    requests: int | None = None
    rows: list[FitRow] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)
    sensitivity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """From JSON; an unknown or missing field raises `PolicyError`."""
        values = dict(_checked(cls, values))
        values["rows"] = [FitRow(**_checked(FitRow, row)) for row in values.get("rows", [])]
        return cls(**values)


@dataclass(frozen=True)
class PhaseReport:
    """A part of a load and how long it took, in seconds; together, in their order, they are the whole load.

    `resolve`: find the checkpoint. `plan`: read the headers, build the model without weights, decide. `compile`: what
    was left to do of the kernels after that. `check`: whether it fits. `stream`: read and quantize. `finish`: tie
    weights, close files.
    """

    name: str
    seconds: float


@dataclass
class LoadReport:
    """Everything a load says about itself; sizes in bytes, `seconds` in seconds.

    `peak_bytes` is the highest memory above `baseline_bytes`, the value before the load. `layers` are the quantized
    modules, `kept` those that were not, `timeline` at most 200 points. `bytes_between` were read besides `bytes_read`:
    they lie between short rows of which only some columns were wanted. `cache` is what became of the load with one.
    `unexpected` are checkpoint tensors that the model class does not know, with their bytes, `ignored_tensors` those
    that it passes over by itself: none of them was read. `initialized` are parameters that it lets be missing,
    `overlaid` tensors that lie in several shards, of which the one that the index names was read, `untied` parameters
    that the model ties to others and the checkpoint has with values of their own, which they keep. `non_finite` are
    weights with NaN or infinities in them that were loaded all the same. `digest` is that of the final tensors, which
    took `digest_seconds` after the load; None where it was not asked for. Of a conversion, `output` is the folder it
    wrote, `output_bytes` are those of all files in it, `read_by` are the tools that were seen to read such a
    checkpoint, and `documents` are the model card and the license files in it. Where a model is spread over several
    processes, each has a report of its part: that of `rank`, of `world_size`; `rank_bytes_read`,
    `rank_final_bytes` and `rank_peak_bytes` are those of each of them, `replicated_bytes` are the bytes of the
    checkpoint that all of them need. `state` is that of the weights:
    a reload that failed leaves them incomplete. Of a checkpoint that was read from a server, `source_requests` are the
    requests by result, `source_retries` those that were made again, `source_bytes` all bytes that came,
    `source_connections` how many requests were in flight at most.
    `limit_bytes` is what the caller allowed (None: no limit), `available_bytes`
    what the machine had for the load before it (None: not known), `phases` what took how long. To do the same again:
    `command` is what was typed (None: called from Python), `commit` that of a checkpoint from the hub, `versions` are
    those of the packages by name. `fit` says which schemes were chosen, where a size was given instead of a scheme.
    """

    model: str
    quantization: str
    device: str
    seconds: float
    bytes_read: int
    checkpoint_bytes: int
    final_bytes: int
    peak_bytes: int
    staging_peak_bytes: int
    baseline_bytes: int
    predicted_final_bytes: int
    predicted_peak_bytes: int
    fallback_conversions: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    kept: list[KeptReport] = field(default_factory=list)
    timeline: list[TimelinePoint] = field(default_factory=list)
    cache: CacheResult | None = None
    unexpected: list[str] = field(default_factory=list)
    unexpected_bytes: int = 0
    ignored_tensors: int = 0
    initialized: list[str] = field(default_factory=list)
    overlaid: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    non_finite: list[NonFiniteReport] = field(default_factory=list)
    digest: str | None = None
    digest_seconds: float | None = None
    output: str | None = None
    output_bytes: int | None = None
    read_by: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    rank: int | None = None
    world_size: int | None = None
    state: LoadState = "complete"
    rank_bytes_read: list[int] = field(default_factory=list)
    rank_final_bytes: list[int] = field(default_factory=list)
    rank_peak_bytes: list[int] = field(default_factory=list)
    replicated_bytes: int = 0
    bytes_between: int = 0
    source_requests: list[RequestsReport] = field(default_factory=list)
    source_retries: int | None = None
    source_bytes: int | None = None
    source_connections: int | None = None
    limit_bytes: int | None = None
    available_bytes: int | None = None
    phases: list[PhaseReport] = field(default_factory=list)
    command: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    fit: FitReport | None = None

    def note_ranks(self, sizes: Iterable[tuple[int, int, int]], replicated_bytes: int) -> None:
        """Say what each rank read, holds and took at most."""
        read, final, peak = zip(*sizes, strict=True)
        self.rank_bytes_read, self.rank_final_bytes, self.rank_peak_bytes = [*read], [*final], [*peak]
        self.replicated_bytes = replicated_bytes

    def note_source(self, requests: Mapping[str, int], retries: int, nbytes: int, connections: int) -> None:
        """Say what was asked of a server, and what came."""
        self.source_requests = [RequestsReport(result, count) for result, count in sorted(requests.items())]
        self.source_retries, self.source_bytes, self.source_connections = retries, nbytes, connections

    def note_divergence(self, divergences: Mapping[str, float]) -> None:
        """What quantizing a module alone does to the model's predictions, by its name, in nats a token.

        Raises `PolicyError` for a name that is no quantized layer, and for what is not finite or below 0.
        """
        names = {layer.name for layer in self.layers}
        for name, value in divergences.items():
            if name not in names:
                raise PolicyError(f"the report has no quantized layer {name!r}; names are those of `layers`")
            if not (math.isfinite(value) and value >= 0):
                raise PolicyError(f"the divergence of {name} is {value}; give nats a token, 0 or more")
        self.layers = [replace(each, divergence=divergences.get(each.name, each.divergence)) for each in self.layers]

    @property
    def bytes_per_second(self) -> float:
        """Bytes read per second of the whole load; 0 for a load that took no time."""
        return self.bytes_read / self.seconds if self.seconds > 0 else 0.0

    @property
    def increase_bytes(self) -> int:
        """Memory the load left behind: the last measured point of the timeline, or `final_bytes` without one."""
        return self.timeline[-1].memory if self.timeline else self.final_bytes

    def __repr__(self) -> str:
        return (
            f"<LoadReport: {self.model} as {self.quantization} on {self.device}, {len(self.layers)} modules quantized, "
            f"{len(self.kept)} kept, {format_bytes(self.final_bytes)}, peak {format_bytes(self.peak_bytes)}, "
            f"{self.seconds:.1f} s>"
        )

    def _repr_html_(self) -> str:
        from ..page.document import in_notebook, report_page  # here: a load does not show itself

        schemes = sorted({layer.scheme for layer in self.layers})
        rows = (
            ("quantized", f"{len(self.layers)} modules ({', '.join(schemes)})" if schemes else "nothing"),
            ("kept as stored", f"{len(self.kept)} modules"),
            ("checkpoint", format_bytes(self.checkpoint_bytes)),
            ("model", format_bytes(self.final_bytes)),
            ("peak", f"{format_bytes(self.peak_bytes)}, {format_bytes(self.predicted_peak_bytes)} were predicted"),
            ("time", f"{self.seconds:.1f} s"),
        )
        table = small_table(f"{self.model} as {self.quantization} on {self.device}", rows)
        return table + in_notebook(report_page(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able dicts, lists, strings and numbers; an infinite or NaN number becomes None."""
        plain: dict[str, Any] = _without_nonfinite(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The report `to_dict` gave; an unknown or missing field raises `PolicyError`."""
        values = dict(_checked(cls, values))
        items: dict[str, type[Any]] = {
            "layers": LayerReport,
            "kept": KeptReport,
            "timeline": TimelinePoint,
            "non_finite": NonFiniteReport,
            "source_requests": RequestsReport,
            "phases": PhaseReport,
        }
        for name, item in items.items():
            values[name] = [item(**_checked(item, entry)) for entry in values.get(name, [])]
        if values.get("fit") is not None:
            values["fit"] = FitReport.from_dict(values["fit"])
        return cls(**values)

    def records(self, table: ReportTable) -> list[dict[str, Any]]:
        """The rows of a table as plain dicts, which `pandas.DataFrame` and its like take as they are.

        `layers`, `kept`, `timeline` or `phases`, with the fields that their classes have; numbers that are not finite
        stay. Raises `PolicyError` for another name.
        """
        if table not in get_args(ReportTable):
            raise PolicyError(f"a report has no table {table!r}; it has {', '.join(get_args(ReportTable))}")
        return [asdict(row) for row in getattr(self, table)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path` as indented JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report that `save`, or --report, wrote; raises `PolicyError` where `path` holds something else."""
        try:
            with open(path, "rb") as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
            values = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{os.fspath(path)} is not a load report: {error}; {_GIVE}") from error
        return cls.from_dict(values)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _checked(cls: type[Any], values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise PolicyError(
            f"not a load report: {type(values).__name__} where the fields of {cls.__name__} are expected; {_GIVE}"
        )
    known = {f.name for f in fields(cls)}
    # Fields with a default may be absent, as in a report written by an older release.
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    unknown, missing = sorted(set(values) - known), sorted(required - set(values))
    if unknown or missing:
        raise PolicyError(
            f"not a load report: {cls.__name__} has unknown fields {_few(unknown)} and lacks {_few(missing)}; {_GIVE}"
        )
    for each in fields(cls):
        if each.name in values and not _fits(values[each.name], str(each.type)):
            given = str(values[each.name])[:100]
            raise PolicyError(
                f"not a load report: {each.name} of {cls.__name__} is {given!r}, expected {each.type}; {_GIVE}"
            )
    return values


def _few(names: Sequence[str]) -> str:
    """The first of some names, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > NAMES_SHOWN else ""
    return f"[{', '.join(names[:NAMES_SHOWN])}{more}]"


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value from JSON is of the type that a field of a report says; objects in lists are looked at apart."""
    kind = annotation.removesuffix(" | None")
    if value is None or isinstance(value, bool):
        return value is None and kind != annotation
    if kind.startswith("list["):
        inner = kind[len("list[") : -1]
        return isinstance(value, list) and (inner not in _PLAIN or all(_fits(item, inner) for item in value))
    if kind in ("dict[str, Any]", "FitReport"):
        return isinstance(value, dict)
    if kind == "dict[str, str]":
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return isinstance(value, _PLAIN.get(kind, str))
