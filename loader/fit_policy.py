"""Choose a scheme for every module, so that least is lost of a model whose load stays below a size.

Modules are taken together by what they are and where: the projections to queries, keys and values of a layer, the one
from attention, gate and up, down, experts. All begin with the smallest scheme of `LADDER`. Then that step up is taken,
again and again, which saves most expected loss for its bytes, among those that still fit. What a scheme is expected to
lose of a module is the relative squared error of its weights times how much the output feels such a module at such a
depth, `SENSITIVITY`. The model is planned once more with what was chosen: that plan's peak is what counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .draft import Draft, plan_quantized
from .errors import MemoryBudgetError, PolicyError
from .memory.amounts import format_bytes, parse_bytes
from .options import LoadOptions, QuantizationPolicy
from .scheme_peaks import bytes_more
from .schemes.policy import matches
from .schemes.registry import AS_STORED, SchemeFactory

LADDER: Mapping[str, float] = MappingProxyType(
    {"nl4": 5.9e-3, "mxfp6_e2m3": 7.1e-4, "int8_per_channel": 5.4e-5, AS_STORED: 0.0}
)
"""The schemes that modules get, smallest first, and the relative squared error of weights in them."""
FIRST, MIDDLE, LAST = "first", "middle", "last"
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "query", "key", "value"),
        "o": ("o_proj", "out_proj"),
        "gate_up": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "w1", "w3"),
        "down": ("down_proj", "fc2", "w2"),
    }
)
"""What linear layers are called; an engine runs those of a kind in a layer as one, or may."""
SENSITIVITY: Mapping[tuple[str, str], float] = MappingProxyType(
    {
        ("qkv", FIRST): 0.488, ("qkv", MIDDLE): 0.157, ("qkv", LAST): 0.289,
        ("o", FIRST): 0.395, ("o", MIDDLE): 0.119, ("o", LAST): 0.101,
        **{
            (kind, third): value
            for kind in ("experts", "gate_up", "down")
            for third, value in ((FIRST, 0.169), (MIDDLE, 0.102), (LAST, 0.152))
        },
    }
)  # fmt: skip
"""Divergence of the output, in nats a token, for a relative squared error of 1 of all modules of a kind in a third of
the layers, measured on the demo model by `bench/sensitivity.py`; gate_up and down are taken to be as its experts."""
MOST_TRIES = 4


@dataclass(frozen=True)
class Item:
    """Modules that get one scheme: of one kind, in one layer. `loss` is that for a relative squared error of 1."""

    place: str
    kind: str
    third: str
    names: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class FittedRow:
    """What was chosen for a kind of module in a third of the layers: how many modules have a scheme, and their part of
    the expected loss."""

    kind: str
    third: str
    scheme: str
    modules: int
    share_of_loss: float


@dataclass(frozen=True)
class Fitted:
    """A policy whose load stays below `size` bytes, by its plan."""

    policy: QuantizationPolicy
    size: int
    final_bytes: int
    peak_bytes: int
    rows: tuple[FittedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `policy` alone, in a file, is what `QuantizationPolicy.from_file` reads."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """What was chosen, for people."""
        yield f"Fit: a peak of {format_bytes(self.peak_bytes)} is planned, of {format_bytes(self.size)}"
        for row in self.rows:
            where = f"{row.kind}, {row.third} third of the layers"
            yield f"Fit: {where}: {row.modules} {row.scheme}, {row.share_of_loss:.0%} of the expected loss"


def fit_policy(
    model_id: str | Path,
    size: str | int,
    *,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Fitted:
    """The policy of the least expected loss whose load is planned to peak below `size`, such as "16GiB".

    Ignore patterns and overrides of `policy` count as they are. Raises `MemoryBudgetError` where not even the smallest
    schemes fit, and `PolicyError` for a checkpoint that is quantized already, or a policy that names schemes.
    """
    policy, options, limit = policy or QuantizationPolicy(), options or LoadOptions(), parse_bytes(size)
    if policy.linear != "auto" or policy.experts is not None:
        raise PolicyError("fit chooses the schemes: give no scheme for linear layers or experts beside it")

    def plan(chosen: QuantizationPolicy) -> Draft:
        return plan_quantized(
            model_id,
            "auto",
            device=device,
            policy=chosen,
            options=replace(options, max_memory=None),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )

    smallest = next(iter(LADDER))
    draft = plan(replace(policy, linear=smallest))
    if draft.rules.is_quantized:
        raise PolicyError("fit chooses schemes for checkpoints in BF16, FP16 or FP32; this one is quantized already")
    least = draft.plan.memory.peak_bytes
    if least > limit:
        raise MemoryBudgetError(
            f"nothing fits: with all modules in {smallest}, the smallest, the load is predicted to take "
            f"{format_bytes(least)}, and fit is {format_bytes(limit)}"
        )
    items = items_of(draft, policy)
    return _fitted(draft, policy, items, _steps(draft, items, options), limit, plan)


def items_of(draft: Draft, policy: QuantizationPolicy | None = None) -> list[Item]:
    """The modules that schemes can be chosen for, together with those that must have the same."""
    given = [pattern for pattern, _ in policy.overrides] if policy is not None else []
    names = [
        assignment.name
        for assignment in draft.assignments
        if assignment.scheme is not None and not any(matches(pattern, assignment.name) for pattern in given)
    ]
    experts = {each.name for each in draft.assignments if each.kind == "experts"}
    found: dict[tuple[str, str], list[str]] = {}
    count: dict[str, int] = {}
    for name in names:
        stack, number = _layer(name)
        count[stack] = max(count.get(stack, 0), number + 1)
        kind = "experts" if name in experts else _kind(name)
        place = name if kind == "other" else f"{stack}.{number}"
        found.setdefault((place, kind), []).append(name)
    items = []
    for (place, kind), members in found.items():
        stack, number = _layer(members[0])
        third = _third(number, count[stack])
        alike = sum(1 for each in range(count[stack]) if _third(each, count[stack]) == third)
        items.append(Item(place, kind, third, tuple(members), sensitivity(kind, third) / max(alike, 1)))
    return items


def sensitivity(kind: str, third: str) -> float:
    """How much the output feels a kind of module; one that was not measured counts as the mean of all."""
    known = SENSITIVITY.get((kind, third))
    return known if known is not None else sum(SENSITIVITY.values()) / len(SENSITIVITY)


@dataclass(frozen=True)
class _Step:
    """Another scheme for an item, the next one up: what it takes more, and what it is expected to save."""

    item: int
    level: int
    nbytes: int
    saved: float


def _steps(draft: Draft, items: Sequence[Item], options: LoadOptions) -> list[_Step]:
    """All steps of all items, those first that save most for their bytes; of an item in the order of the ladder."""
    assigned = {assignment.name: assignment for assignment in draft.assignments}
    more: list[list[int]] = [[0] for _ in items]
    for scheme in [*LADDER][1:]:
        factory = SchemeFactory(draft.schemes.device, options)
        rules = draft.rules.with_scheme(scheme, factory)
        for number, item in enumerate(items):
            more[number].append(sum(bytes_more(draft, assigned[name], rules) for name in item.names))
    errors = [*LADDER.values()]
    found = [
        _Step(number, level, more[number][level] - more[number][level - 1], item.loss * (errors[level - 1] - error))
        for number, item in enumerate(items)
        for level, error in enumerate(errors)
        if level
    ]
    return sorted(found, key=lambda step: (-step.saved / max(step.nbytes, 1), step.item, step.level))


def _chosen(items: Sequence[Item], steps: Sequence[_Step], room: int) -> list[int]:
    """The level of each item, within so many bytes more than the smallest schemes take."""
    levels, left, closed = [0] * len(items), room, set()
    for step in steps:
        if step.item in closed or step.level != levels[step.item] + 1:
            continue
        if step.nbytes > left:
            closed.add(step.item)
            continue
        levels[step.item], left = step.level, left - step.nbytes
    return levels


def _fitted(
    draft: Draft,
    policy: QuantizationPolicy,
    items: Sequence[Item],
    steps: Sequence[_Step],
    limit: int,
    plan: Callable[[QuantizationPolicy], Draft],
) -> Fitted:
    """What fits by a plan of its own: what is held beside the weights differs from scheme to scheme."""
    room = limit - draft.plan.memory.peak_bytes
    for _ in range(MOST_TRIES):
        levels = _chosen(items, steps, room)
        chosen = _as_policy(policy, items, levels)
        memory = (plan(chosen) if any(levels) else draft).plan.memory
        if memory.peak_bytes <= limit:
            return Fitted(chosen, limit, memory.final_bytes, memory.peak_bytes, tuple(_rows(items, levels)))
        room -= memory.peak_bytes - limit
    levels, memory = [0] * len(items), draft.plan.memory
    chosen = _as_policy(policy, items, levels)
    return Fitted(chosen, limit, memory.final_bytes, memory.peak_bytes, tuple(_rows(items, levels)))


def _as_policy(policy: QuantizationPolicy, items: Sequence[Item], levels: Sequence[int]) -> QuantizationPolicy:
    schemes = [*LADDER]
    most = max(range(len(schemes)), key=lambda level: sum(each == level for each in levels), default=0)
    own = [
        (name, schemes[level])
        for item, level in zip(items, levels, strict=True)
        if level != most
        for name in item.names
    ]
    return replace(policy, linear=schemes[most], overrides=(*policy.overrides, *own))


def _rows(items: Sequence[Item], levels: Sequence[int]) -> Iterator[FittedRow]:
    schemes, errors = [*LADDER], [*LADDER.values()]
    modules: dict[tuple[str, str, str], int] = {}
    losses: dict[tuple[str, str, str], float] = {}
    for item, level in zip(items, levels, strict=True):
        key = item.kind, item.third, schemes[level]
        modules[key] = modules.get(key, 0) + len(item.names)
        losses[key] = losses.get(key, 0.0) + item.loss * errors[level]
    total = sum(losses.values())
    for key, count in modules.items():
        yield FittedRow(*key, count, losses[key] / total if total else 0.0)


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return next((kind for kind, names in KINDS.items() if last in names), "other")


def _layer(name: str) -> tuple[str, int]:
    """The stack of layers that a module is in, and the number of its layer; one of its own where there is none."""
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", name)
    return (found[1], int(found[2])) if found else (name, 0)


def _third(number: int, count: int) -> str:
    return (FIRST, MIDDLE, LAST)[3 * number // max(count, 1)] if count > 1 else MIDDLE
