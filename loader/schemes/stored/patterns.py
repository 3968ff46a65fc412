"""Which modules a config means: by their names, by regular expressions, by globs."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from ...errors import CheckpointError
from ..expressions import Expression, MatchingTime, UnboundedPatternError, joined

T = TypeVar("T")
Said = tuple[str, Expression]
"""What the config says, and what it means."""


def _itself(pattern: str) -> tuple[str, ...]:
    return (pattern,)


class Patterns:
    """Names, regular expressions (`re:`, from the start of a name) and, if they are `globs`, globs.

    `meaning` gives the patterns that one in the config stands for; messages show what the config says.
    """

    def __init__(
        self,
        patterns: Iterable[str],
        where: str,
        *,
        globs: bool = False,
        meaning: Callable[[str], tuple[str, ...]] = _itself,
    ) -> None:
        self._names: dict[str, str] = {}
        self._expressions: list[Said] = []
        self._where, self._time = where, MatchingTime()
        with _bounded(where):
            for said in self._time.each(patterns):
                for pattern in meaning(said):
                    if _is_pattern(pattern, globs):
                        self._expressions.append((said, compile_pattern(pattern, where, said)))
                    else:
                        self._names.setdefault(pattern, said)
            # Tens of thousands of modules are asked about, and most lists mean hardly one of them.
            self._any = [("its patterns", each) for each in joined(each for _, each in self._expressions)]

    def first(self, name: str) -> str | None:
        """What the config says that names a module: its own name before any pattern, and of those the first."""
        if name in self._names or not self._expressions:
            return self._names.get(name)
        with _bounded(self._where):
            if len(self._any) < len(self._expressions) and _first(self._any, name, self._time) is None:
                return None
            found = _first(self._expressions, name, self._time)
        return None if found is None else found[0]


@contextlib.contextmanager
def _bounded(where: str) -> Iterator[None]:
    """Makes of what is said about the time of matching what is wrong with the config."""
    try:
        yield
    except UnboundedPatternError as error:
        raise CheckpointError(f"config.json: {where} {error}") from error


def _first(expressions: Iterable[Said], name: str, limited: MatchingTime) -> Said | None:
    """The first that fits the start of a name."""
    return next((said for said in limited.each(expressions) if _fits(*said, name)), None)


def _fits(said: str, expression: Expression, name: str) -> bool:
    try:
        return expression.match(name)
    except UnboundedPatternError as error:
        raise UnboundedPatternError(f"has {said[:200]!r}, which {error}") from error


class Lookup(Generic[T]):
    """Values by module name or pattern; a name comes before any pattern, and of those the first that fits."""

    def __init__(self, values: Mapping[str, T], where: str, *, globs: bool = False) -> None:
        self._values = values
        self._patterns = Patterns(values, where, globs=globs)

    def find(self, name: str) -> tuple[str, T] | None:
        """The pattern that fits a module, with its value."""
        pattern = self._patterns.first(name)
        return None if pattern is None else (pattern, self._values[pattern])


class Prefixes:
    """Module names or regular expressions that mean every module below them too, or stand at the end of a name.

    The rule of transformers' `should_convert_module`, except that an ending must begin after a dot there as well.
    """

    def __init__(self, patterns: Iterable[str], where: str) -> None:
        listed = list(patterns)
        self._where, self._time = where, MatchingTime()
        with _bounded(where):
            self._expressions = [
                (pattern, compile_pattern(_prefix(pattern), where, pattern)) for pattern in self._time.each(listed)
            ]
        # A config may list hundreds of names, and tens of thousands of modules are asked about: one look at them all.
        names = [pattern for pattern in listed if _NAME.fullmatch(pattern)]
        self._any: list[Said] = [
            ("its names", compile_pattern(_prefix("|".join(names[start : start + _AT_ONCE])), where, "its names"))
            for start in range(0, len(names), _AT_ONCE)
        ]
        self._any += [said for said in self._expressions if not _NAME.fullmatch(said[0])]
        self._endings = tuple([f".{pattern}" for pattern in listed])

    def first(self, name: str) -> str | None:
        """The first pattern that means a module."""
        with _bounded(self._where):
            if not name.endswith(self._endings) and _first(self._any, name, self._time) is None:
                return None
            return next(
                pattern
                for pattern, expression in self._time.each(self._expressions)
                if name.endswith(f".{pattern}") or _fits(pattern, expression, name)
            )


_AT_ONCE = 100
"""Names that are looked at together."""
_NAME = re.compile(r"[\w.-]+")
"""What stands for itself, dots aside."""


def _prefix(pattern: str) -> str:
    return rf"re:(?:{pattern})(?:(?<=\.)|(?=\.|$))"


def _is_pattern(pattern: str, globs: bool) -> bool:
    return pattern.startswith("re:") or (globs and any(character in pattern for character in "*?["))


def compile_pattern(pattern: str, where: str, said: str) -> Expression:
    """What matches a whole name if `pattern` is a glob, and the start of one if it is a regular expression.

    Raises `CheckpointError` that shows what the config says.
    """
    try:
        return Expression(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except UnboundedPatternError as error:
        raise CheckpointError(f"config.json: {where} has {said[:200]!r}, which {error}; correct the config") from error
