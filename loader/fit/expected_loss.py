"""What a model is expected to lose by the schemes of its modules, without a look at a weight.

What a scheme is expected to lose of a module is the relative squared error of its weights, `ERRORS`, times how much the
output feels such a module at such a depth, `SENSITIVITY`. Modules are taken together by what they are and where: the
projections to queries, keys and values of a layer, the one from attention, gate and up, down, experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..draft import Draft
from ..options import QuantizationPolicy
from ..page.costs import BITS
from ..schemes.policy import matches
from ..schemes.registry import AS_STORED
from .vocabulary import BOTH, EMBEDDING, HEAD, NO_VOCABULARY, Vocabulary

ERRORS: Mapping[str, float] = MappingProxyType(
    {
        "quark_mxfp4": 1.27e-2, "mxfp4_rows": 1.05e-2, "int4_per_group": 1.04e-2, "nvfp4": 9.0e-3, "nl4": 5.9e-3,
        "mxfp6_e2m3": 8.0e-4, "mxfp6_e3m2": 2.8e-3, "mxfp8": 7.1e-4, "fp8_per_tensor": 7.0e-4,
        "fp8_per_channel": 6.7e-4, "fp8_per_block": 7.0e-4, "int8_per_channel": 4.8e-5, AS_STORED: 0.0,
    }
)  # fmt: skip
"""The relative squared error of weights in a scheme, of all weights of the demo model, by `bench/sensitivity.py`. Those
schemes are left out that bring linear layers and experts into formats of different sizes."""
NOTHING: Mapping[str, float] = MappingProxyType({})
FIRST, MIDDLE, LAST = "first", "middle", "last"
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "query", "key", "value"),
        "o": ("o_proj", "out_proj", "attention.output.dense"),
        "gate_up": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "w1", "w3", "intermediate.dense"),
        "down": ("down_proj", "fc2", "w2", "output.dense"),
    }
)
"""What linear layers are called, by the ends of names; an engine runs those of a kind in a layer as one, or may."""
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
VOCABULARY_SENSITIVITY: Mapping[str, float] = MappingProxyType({HEAD: 0.85, EMBEDDING: 0.53, BOTH: 1.37})
"""The same of the output head, the embedding, and the two where they are tied."""


@dataclass(frozen=True)
class Item:
    """Modules that get one scheme: of one kind, in one layer. `loss` is that for a relative squared error of 1.

    The head and the embedding are in no third of the layers.
    """

    place: str
    kind: str
    third: str
    names: tuple[str, ...]
    loss: float = 0.0

    @property
    def is_vocabulary(self) -> bool:
        """Whether it is the head or the embedding, which are as stored where no override names them."""
        return self.kind in VOCABULARY_SENSITIVITY

    @property
    def name(self) -> str:
        """What it is called where its own sensitivity is measured."""
        return f"{self.place} {self.kind}"

    @property
    def group(self) -> str:
        """What its kind in its third of the layers is called where the sensitivity of that is measured."""
        return group_name(self.kind, self.third)


def ladder(schemes: Collection[str], sizes: Mapping[str, float] | None = None) -> tuple[str, ...]:
    """Of some schemes those that no other beats in size and in error, the smallest first, and `none` as the last.

    `sizes` are those of the model in each, where they are not as the bits of a weight.
    """
    known = {name: bits for name, ((bits, _), _) in BITS.items()} if sizes is None else sizes
    sized = sorted((known[name], ERRORS[name], name) for name in schemes if name in ERRORS and name != AS_STORED)
    found: list[str] = []
    for _, error, name in sized:
        if not found or error < ERRORS[found[-1]]:
            found.append(name)
    return (*found, AS_STORED)


def items_of(
    draft: Draft,
    policy: QuantizationPolicy | None = None,
    measured: Mapping[str, float] = NOTHING,
    vocabulary: Vocabulary = NO_VOCABULARY,
) -> list[Item]:
    """The modules that schemes can be chosen for, together with those that must have the same.

    Those that an override of `policy` names keep what it gives them, and are left out. `measured` has sensitivities by
    `Item.name` or `Item.group`, where they are known better than from the demo model. `vocabulary` comes last.
    """
    given = [pattern for pattern, _ in policy.overrides] if policy is not None else []
    given += vocabulary.names
    names = [
        assignment.name
        for assignment in draft.assignments
        if assignment.scheme is not None and not any(matches(pattern, assignment.name) for pattern in given)
    ]
    items = grouped(names, {each.name for each in draft.assignments if each.kind == "experts"}, measured)
    for kind, members in vocabulary.groups():
        items.append(Item(members[0], kind, "", members, VOCABULARY_SENSITIVITY[kind]))
    return items


def grouped(names: Sequence[str], experts: Collection[str], measured: Mapping[str, float] = NOTHING) -> list[Item]:
    """Modules together with those that must have the same scheme; `measured` is as in `items_of`."""
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
        item = Item(place, kind, third, tuple(members))
        shared = measured.get(item.group, sensitivity(kind, third)) / max(alike, 1)
        items.append(replace(item, loss=measured.get(item.name, shared)))
    return items


def group_name(kind: str, third: str) -> str:
    """What a kind of module in a third of the layers is called where its sensitivity is measured."""
    return f"{kind} {third}"


def sensitivity(kind: str, third: str) -> float:
    """How much the output feels a kind of module; one that was not measured counts as the mean of all."""
    known = SENSITIVITY.get((kind, third))
    return known if known is not None else sum(SENSITIVITY.values()) / len(SENSITIVITY)


def _kind(name: str) -> str:
    ends = tuple(".".join(name.split(".")[-count:]) for count in (1, 2, 3))
    return next((kind for kind, names in KINDS.items() if any(end in names for end in ends)), "other")


def _layer(name: str) -> tuple[str, int]:
    """The stack of layers that a module is in, and the number of its layer; one of its own where there is none."""
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", name)
    return (found[1], int(found[2])) if found else (name, 0)


def _third(number: int, count: int) -> str:
    return (FIRST, MIDDLE, LAST)[3 * number // max(count, 1)] if count > 1 else MIDDLE
