"""Names that differ only in their numbers, and what a function makes of all of them, learned from a few.

A checkpoint with one tensor an expert has tens of thousands of names that say the same thing with other numbers. Of
such a family a function is asked about as few members as show every number in every place; where its answers follow
from the numbers alone, the others follow too. Where they do not, it is asked about every one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator

Numbers = list[str]
Renamed = tuple[str, str | None]
Member = tuple[Numbers, str]

# Where transformers sorts by value: at the end of a part between two dots.
_NUMBER = re.compile(r"([0-9]+)(?=\.|$)")


def families(names: Iterable[str]) -> list[list[Member]]:
    """Names in groups that differ only in their numbers, each in the order of those."""
    found: dict[tuple[str, ...], list[Member]] = {}
    for name in names:
        parts = _NUMBER.split(name)
        found.setdefault(tuple(parts[::2]), []).append((parts[1::2], name))
    for members in found.values():
        members.sort(key=lambda member: [*map(int, member[0])])
    return list(found.values())


def rename_family(
    members: list[Member], rename: Callable[[str], Renamed], known: Container[str]
) -> Iterator[tuple[str, Renamed]]:
    """Every name of a family with what `rename` makes of it: another name, and a pattern.

    What follows from the numbers is believed only where it is a `known` name; any other is asked about.
    """
    witnesses = _witnesses(members)
    answers = [rename(name) for _, name in witnesses]
    rule = _learn([numbers for numbers, _ in witnesses], answers) if len(witnesses) < len(members) else None
    if rule is None:
        asked = {name: answer for (_, name), answer in zip(witnesses, answers, strict=True)}
        yield from ((name, asked[name] if name in asked else rename(name)) for _, name in members)
        return
    made: dict[tuple[str, ...], Renamed] = {}
    for numbers, name in members:
        key = rule.key(numbers)
        renamed = made.get(key)
        if renamed is None:
            renamed = made[key] = rule.apply(key)
        yield name, renamed if renamed[0] in known else rename(name)


def _witnesses(members: list[Member]) -> list[Member]:
    """Members that between them show every number in every place: the first one of each."""
    chosen = {0}
    for place in range(len(members[0][0])):
        first = {members[i][0][place]: i for i in range(len(members) - 1, -1, -1)}
        chosen.update(first.values())
    return [members[i] for i in sorted(chosen)]


class _Rule:
    """The texts of a new name, and for each number in it the place it comes from and what becomes of it there."""

    def __init__(self, texts: list[str], places: list[int], values: list[dict[str, str]], pattern: str | None) -> None:
        self._texts, self._places, self._values, self._pattern = texts, places, values, pattern

    def key(self, numbers: Numbers) -> tuple[str, ...]:
        """The numbers a new name depends on."""
        return tuple([numbers[place] for place in self._places])

    def apply(self, key: tuple[str, ...]) -> Renamed:
        """The new name for the numbers of a key."""
        new = [values[number] for values, number in zip(self._values, key, strict=True)]
        parts = [part for pair in zip(self._texts, [*new, ""], strict=True) for part in pair]
        return "".join(parts), self._pattern


def _learn(numbers: list[Numbers], answers: list[Renamed]) -> _Rule | None:
    """The rule that explains all answers, if there is exactly one."""
    if len({pattern for _, pattern in answers}) != 1:
        return None
    split = [_NUMBER.split(name) for name, _ in answers]
    if len({tuple(parts[::2]) for parts in split}) != 1:
        return None
    places, values = [], []
    for new in zip(*(parts[1::2] for parts in split), strict=True):
        explained = {}
        for place in range(len(numbers[0])):
            value: dict[str, str] = {}
            if all(value.setdefault(old[place], n) == n for old, n in zip(numbers, new, strict=True)):
                explained[place] = value
        if len(explained) != 1 and not (explained and len(set(new)) == 1):
            return None
        place = next(iter(explained))
        places.append(place)
        values.append(explained[place])
    return _Rule(split[0][::2], places, values, answers[0][1])
