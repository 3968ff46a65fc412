"""Predicts what a load will take from the sizes in the checkpoint headers, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .amounts import MIB, format_bytes
from .html import small_table

# What a load may take beyond the model and the staging arena; part of the promise made to users.
SLACK_BYTES = 64 * MIB


@dataclass(frozen=True)
class ParameterSize:
    """One parameter before and after quantization.

    `name` is the model's name of it, `kind` is `linear`, `experts` or another word for what can only be kept, `scheme`
    the scheme name (`none`: kept as stored). `bytes_in` are its bytes in the checkpoint, `bytes_out` its bytes in the
    model, scales, zero points and padding included. A tied parameter is given once.
    """

    name: str
    kind: str
    scheme: str
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class SchemeTotal:
    """How many parameters a scheme takes, and their bytes in the checkpoint and in the model."""

    parameters: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction for one load; every size in bytes.

    `checkpoint_bytes`: tensors to read. `final_bytes`: parameters and buffers after the load. `staging_bytes`: the
    arena. `slack_bytes`: allowance for everything else. `peak_bytes` = final + staging + slack. `by_scheme`: totals
    per scheme name, `none` for what is kept as stored. `quantizable_kept_bytes`: bytes of linear and experts
    parameters that are kept, which another policy could quantize.
    """

    checkpoint_bytes: int
    final_bytes: int
    staging_bytes: int
    slack_bytes: int
    peak_bytes: int
    parameters_quantized: int
    parameters_kept: int
    by_scheme: dict[str, SchemeTotal] = field(hash=False)
    quantizable_kept_bytes: int = 0

    def sizes(self) -> tuple[tuple[str, int], ...]:
        """What the peak is made of, in bytes, by the names people read."""
        return (
            ("checkpoint", self.checkpoint_bytes),
            ("model", self.final_bytes),
            ("staging arena", self.staging_bytes),
            ("overhead allowance", self.slack_bytes),
            ("peak", self.peak_bytes),
        )

    def __repr__(self) -> str:
        return f"<MemoryPlan: {', '.join(f'{name} {format_bytes(size)}' for name, size in self.sizes())}>"

    def _repr_html_(self) -> str:
        return small_table("Predicted memory", ((name, format_bytes(size)) for name, size in self.sizes()))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dicts and integers, for JSON."""
        return asdict(self)


def plan_memory(
    parameter_sizes: Iterable[ParameterSize],
    buffers_bytes: int,
    staging_bytes: int,
    *,
    transient_bytes: int = 0,
    overhead_bytes: int = SLACK_BYTES,
    checkpoint_bytes: int | None = None,
) -> MemoryPlan:
    """Predict final and peak bytes of a load.

    `buffers_bytes`: all buffers of the finished model. `transient_bytes`: the largest group of tensors that a fallback
    conversion holds whole at one time; it is counted in `slack_bytes`. `overhead_bytes`: allowance for threads, the
    allocator, and the objects of modules, tensors and pieces. `checkpoint_bytes`: bytes to read where they differ from
    the sum of `bytes_in`, as when a tied tensor is stored twice. Raises `ValueError` for a negative size and for a name
    given twice, either of which would make the prediction wrong.
    """
    for label, size in (("buffers", buffers_bytes), ("staging", staging_bytes), ("transient", transient_bytes)):
        if size < 0:
            raise ValueError(f"{label}_bytes is {size}; give zero or more")
    groups: dict[str, list[ParameterSize]] = {}
    seen: set[str] = set()
    for parameter in parameter_sizes:
        if parameter.name in seen:
            raise ValueError(f"parameter {parameter.name} is in the plan twice; give each parameter, tied or not, once")
        if parameter.bytes_in < 0 or parameter.bytes_out < 0:
            raise ValueError(f"parameter {parameter.name} has a negative size: {parameter}")
        seen.add(parameter.name)
        groups.setdefault(parameter.scheme, []).append(parameter)
    by_scheme = {scheme: _total(parameters) for scheme, parameters in sorted(groups.items())}
    kept = by_scheme["none"].parameters if "none" in by_scheme else 0
    final_bytes = buffers_bytes + sum(total.bytes_out for total in by_scheme.values())
    slack_bytes = overhead_bytes + transient_bytes
    if checkpoint_bytes is None:
        checkpoint_bytes = sum(total.bytes_in for total in by_scheme.values())
    return MemoryPlan(
        checkpoint_bytes=checkpoint_bytes,
        final_bytes=final_bytes,
        staging_bytes=staging_bytes,
        slack_bytes=slack_bytes,
        peak_bytes=final_bytes + staging_bytes + slack_bytes,
        parameters_quantized=len(seen) - kept,
        parameters_kept=kept,
        by_scheme=by_scheme,
        quantizable_kept_bytes=sum(p.bytes_out for p in groups.get("none", []) if p.kind in ("linear", "experts")),
    )


def _total(parameters: list[ParameterSize]) -> SchemeTotal:
    return SchemeTotal(len(parameters), sum(p.bytes_in for p in parameters), sum(p.bytes_out for p in parameters))
