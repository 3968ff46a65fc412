"""What there is to choose for the modules of a model: bytes and expected loss of each in each scheme of a ladder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..draft import Draft
from ..memory.report import FitRow
from ..memory.verdict import SchemePeak
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.registry import AS_STORED, SchemeFactory
from .expected_loss import ERRORS, NOTHING, Item, items_of, ladder
from .peaks import bytes_now, bytes_with, scheme_peaks
from .vocabulary import NO_VOCABULARY, Vocabulary

Sizes = Mapping[str, Mapping[str, int]]
"""Bytes of modules by scheme, then by name."""


def known_error(item: Item, scheme: str) -> float:
    """The relative squared error of weights in a scheme, whatever they are."""
    return ERRORS[scheme]


def ladder_of(draft: Draft, options: LoadOptions) -> tuple[str, ...]:
    """The schemes that none beats of those that a load could be done with, by the bytes that the model has in each."""
    memory = draft.plan.memory
    own = SchemePeak(draft.rules.policy.linear, memory.final_bytes, memory.peak_bytes)
    return ladder_by_size((own, *scheme_peaks(draft, options, stored=True)))


def ladder_by_size(peaks: Iterable[SchemePeak]) -> tuple[str, ...]:
    """The schemes that none beats of those with some bytes in the end."""
    sizes = {each.scheme: each.final_bytes for each in peaks}
    return ladder(sizes, sizes)


def choice_of(
    draft: Draft,
    policy: QuantizationPolicy,
    schemes: Sequence[str],
    error: Callable[[Item, str], float] = known_error,
    measured: Mapping[str, float] = NOTHING,
    sizes: Sizes | None = None,
    vocabulary: Vocabulary = NO_VOCABULARY,
) -> Choice:
    """What there is to choose from; the draft has one of the schemes.

    `error` is that of an item in a scheme, `measured` are sensitivities as `items_of` takes them. `sizes` has the bytes
    of each module by scheme, where they are not those that it has in memory; one that a scheme leaves as stored is not
    among them. `vocabulary` is what overrides of the draft give its scheme by name.
    """
    items = items_of(draft, policy, measured, vocabulary)
    losses = [[item.loss * error(item, scheme) for scheme in schemes] for item in items]
    nbytes = (
        _sizes(draft, items, schemes, vocabulary)
        if sizes is None
        else [[sum(_size(sizes, scheme, name) for name in item.names) for scheme in schemes] for item in items]
    )
    return Choice(policy, schemes, items, nbytes, losses, schemes.index(draft.rules.policy.linear))


@dataclass(frozen=True)
class Choice:
    """Items and schemes; `sizes` has the bytes of each item in each of them, `losses` the expected loss.

    `planned` is the scheme of the draft, by its place: sizes of others are told from the size that it has.
    """

    policy: QuantizationPolicy
    schemes: Sequence[str]
    items: Sequence[Item]
    sizes: Sequence[Sequence[int]]
    losses: Sequence[Sequence[float]]
    planned: int = 0

    def loss(self, levels: Sequence[int]) -> float:
        """What is expected to be lost with so high a scheme for each item."""
        return sum(own[level] for own, level in zip(self.losses, levels, strict=True))

    def more(self, levels: Sequence[int]) -> int:
        """What items take more than in the scheme of the draft, in bytes; below 0 where it is less."""
        return sum(sizes[level] - sizes[self.planned] for sizes, level in zip(self.sizes, levels, strict=True))

    @property
    def least(self) -> list[int]:
        """The smallest scheme for all items."""
        return [0] * len(self.items)

    def uniform(self) -> Iterator[list[int]]:
        """One scheme for all items, or for all but the head and the embedding; the one that loses least first."""
        stored = len(self.schemes) - 1
        found = [[level] * len(self.items) for level in range(len(self.schemes))]
        if any(item.is_vocabulary for item in self.items):
            found += [[stored if item.is_vocabulary else level for item in self.items] for level in range(stored)]
        yield from sorted(found, key=self.loss)

    def best(self, room: int) -> list[int]:
        """The level of each item, within so many bytes more than in the scheme of the draft; the least, if none are."""
        levels = self.least
        left, closed = room - self.more(levels), set()
        for step in self._steps():
            if step.item in closed:
                continue
            if step.nbytes > left:
                closed.add(step.item)
                continue
            levels[step.item], left = step.level, left - step.nbytes
        return levels

    def _steps(self) -> list[_Step]:
        """All steps of all items, those first that save most for their bytes.

        A step that saves less for its bytes than it does together with the next is none of its own: so those of an item
        come in the order of the ladder.
        """
        found = []
        for number, (sizes, losses) in enumerate(zip(self.sizes, self.losses, strict=True)):
            level = 0
            while level < len(self.schemes) - 1:
                further = [
                    _Step(number, above, sizes[above] - sizes[level], losses[level] - losses[above])
                    for above in range(level + 1, len(self.schemes))
                ]
                found.append(max(further, key=lambda step: (step.worth, step.level)))
                level = found[-1].level
        return sorted(found, key=lambda step: (-step.worth, step.item, step.level))

    def as_policy(self, levels: Sequence[int]) -> QuantizationPolicy:
        """The scheme of most modules, and overrides for the others."""
        counts = [sum(each == level for each in levels) for level in range(len(self.schemes))]
        most = max(range(len(self.schemes)), key=counts.__getitem__)
        own = [
            (name, self.schemes[level])
            for item, level in zip(self.items, levels, strict=True)
            if self._is_override(item, level, most)
            for name in item.names
        ]
        return replace(self.policy, linear=self.schemes[most], overrides=(*self.policy.overrides, *own))

    def _is_override(self, item: Item, level: int, most: int) -> bool:
        if not item.is_vocabulary:
            return level != most
        return self.schemes[level] != AS_STORED or not self.policy.default_ignore

    def rows(self, levels: Sequence[int]) -> Iterator[FitRow]:
        """What was chosen for a kind of module in a third of the layers."""
        found: dict[tuple[str, str, str], tuple[int, int, float]] = {}
        for item, sizes, losses, level in zip(self.items, self.sizes, self.losses, levels, strict=True):
            key = item.kind, item.third, self.schemes[level]
            modules, nbytes, loss = found.get(key, (0, 0, 0.0))
            found[key] = modules + len(item.names), nbytes + sizes[level], loss + losses[level]
        total = sum(loss for _, _, loss in found.values())
        for key, (modules, nbytes, loss) in found.items():
            yield FitRow(*key, modules, nbytes, loss / total if total else 0.0)


@dataclass(frozen=True)
class _Step:
    """Another scheme for an item, a larger one: what it takes more, and what it is expected to save."""

    item: int
    level: int
    nbytes: int
    saved: float

    @property
    def worth(self) -> float:
        """What it saves for a byte; one that takes no more is worth most."""
        return self.saved / max(self.nbytes, 1)


def _size(sizes: Sizes, scheme: str, name: str) -> int:
    return sizes[scheme].get(name, sizes[AS_STORED].get(name, 0))


def _sizes(draft: Draft, items: Sequence[Item], schemes: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
    """The bytes of each item in each scheme; the draft has one of them."""
    assigned = {assignment.name: assignment for assignment in draft.assignments}
    sizes: list[list[int]] = [[] for _ in items]
    for scheme in schemes:
        factory = SchemeFactory(draft.schemes.device, LoadOptions())
        is_planned = scheme == draft.rules.policy.linear
        rules = draft.rules if is_planned else draft.rules.with_scheme(scheme, factory, vocabulary.names)
        for item, own in zip(items, sizes, strict=True):
            modules = [assigned[name] for name in item.names]
            each = [bytes_now(draft, one) if is_planned else bytes_with(draft, one, rules) for one in modules]
            is_shared = scheme == AS_STORED and vocabulary.is_tied and item.is_vocabulary
            own.append(max(each) if is_shared else sum(each))
    return sizes
