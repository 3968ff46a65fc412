"""Which modules a config means: by their names, by regular expressions, by globs."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from ...errors import CheckpointError

T = TypeVar("T")


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
        self._expressions: list[tuple[str, re.Pattern[str]]] = []
        for said in patterns:
            for pattern in meaning(said):
                if _is_pattern(pattern, globs):
                    self._expressions.append((said, compile_pattern(pattern, where, said)))
                else:
                    self._names.setdefault(pattern, said)

    def first(self, name: str) -> str | None:
        """What the config says that names a module: its own name before any pattern, and of those the first."""
        if name in self._names:
            return self._names[name]
        return next((pattern for pattern, expression in self._expressions if expression.match(name)), None)


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
        self._expressions = [
            (pattern, compile_pattern(_prefix(pattern), where, pattern), f".{pattern}") for pattern in listed
        ]
        # A config may list hundreds of names, and tens of thousands of modules are asked about: one look at them all.
        names = [pattern for pattern in listed if _NAME.fullmatch(pattern)]
        together = [compile_pattern(_prefix("|".join(names)), where, "|".join(names))] if names else []
        self._any = [*together, *(found for pattern, found, _ in self._expressions if not _NAME.fullmatch(pattern))]
        self._endings = tuple([ending for *_, ending in self._expressions])

    def first(self, name: str) -> str | None:
        """The first pattern that means a module."""
        if not name.endswith(self._endings) and not any(expression.match(name) for expression in self._any):
            return None
        return next(
            pattern
            for pattern, expression, ending in self._expressions
            if expression.match(name) or name.endswith(ending)
        )


_NAME = re.compile(r"[\w.-]+")
"""What stands for itself, dots aside."""


def _prefix(pattern: str) -> str:
    return rf"re:(?:{pattern})(?:(?<=\.)|(?=\.|$))"


def _is_pattern(pattern: str, globs: bool) -> bool:
    return pattern.startswith("re:") or (globs and any(character in pattern for character in "*?["))


def compile_pattern(pattern: str, where: str, said: str) -> re.Pattern[str]:
    """What matches a whole name if `pattern` is a glob, and the start of one if it is a regular expression.

    Raises `CheckpointError` that shows what the config says.
    """
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise CheckpointError(
            f"config.json: {where} has {said!r}, which is not a regular expression ({error.msg}); correct the config"
        ) from error
