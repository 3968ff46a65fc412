"""Regular expressions that a checkpoint or a user hands us, matched against names of modules in bounded time.

Python's `re` goes back for every way in which a text can be divided among repeats: `(a+)+b` takes minutes on forty
characters, and a config.json is not to be trusted. So the most that a pattern can cost is computed from its parse tree
first; what is cheap however a name looks is left to `re`. Other patterns are matched without going back at all: each
part of the tree makes of the set of positions where it may begin (a bit each) the set of those where it may end.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Hashable, Iterable, Iterator
from re import _compiler, _parser  # type: ignore[attr-defined]  # the parse tree is to be had from nowhere else
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

MAX_PATTERN = 1 << 15
"""Characters of a regular expression."""
MAX_STEPS = 1 << 22
"""Steps that `re` may take for one name, ten or twenty milliseconds."""
MAX_SETS = 1 << 16
"""Sets of positions that are made for one name."""
ORDINARY_NAME = 256
"""Characters of a name up to which `MAX_STEPS` holds in `re`; longer ones are matched by sets of positions."""
MAX_SECONDS = 5.0
"""Processor time for all names and all patterns of one list: a hundred times what those of the largest models take."""

_ONE_CHARACTER = {_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN, _parser.CATEGORY}
_REPEATS = {_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT}
_ENDLESS = float("inf")
_FOLDED_RANGE = 1 << 12


class UnboundedPatternError(ValueError):
    """A pattern that is none, or that cannot be matched in bounded time; the message begins with a verb."""


class _Cost(NamedTuple):
    """Steps of `re` to go through all ways in which a part matches, and how many of those ways there are at most."""

    steps: float
    ways: float


class Expression:
    """A regular expression; asking about a name never takes longer than some milliseconds.

    Raises `UnboundedPatternError` for a text that is none, or is too long to be one for names of modules.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN:
            raise UnboundedPatternError(f"has {len(pattern):,} characters, at most {MAX_PATTERN:,} are read")
        try:
            self._tree = _parser.parse(pattern)
            _check_folding(self._tree)
            cheap = _sequence(self._tree, ORDINARY_NAME).steps <= MAX_STEPS
            self._compiled = re.compile(pattern)
        except re.error as error:
            raise UnboundedPatternError(f"is not a regular expression ({error.msg})") from None
        except (RecursionError, OverflowError) as error:
            raise UnboundedPatternError(f"is not a regular expression that can be compiled ({error})") from None
        self.pattern, self.is_cheap = pattern, cheap
        self._cheap_below = ORDINARY_NAME if cheap else 0
        self._singles: dict[Hashable, re.Pattern[str]] = {}

    def match(self, name: str) -> bool:
        """Whether it fits the start of a name."""
        if len(name) <= self._cheap_below:
            return self._compiled.match(name) is not None
        return _Positions(self._tree, name, self._singles).ends() != 0

    def fullmatch(self, name: str) -> bool:
        """Whether it fits the whole of a name."""
        if len(name) <= self._cheap_below:
            return self._compiled.fullmatch(name) is not None
        return bool(_Positions(self._tree, name, self._singles).ends() >> len(name))


def joined(expressions: Iterable[Expression]) -> list[Expression]:
    """Fewer expressions, of which one matches where one of `expressions` does: asked first where hardly any does."""
    made: list[Expression] = []
    waiting: list[Expression] = []
    for each in expressions:
        if _ALONE.search(each.pattern) or not each.is_cheap:
            made.append(each)
        else:
            waiting.append(each)
    for start in range(0, len(waiting), _AT_ONCE):
        group = waiting[start : start + _AT_ONCE]
        together = Expression("|".join(f"(?:{each.pattern})" for each in group))
        made += [together] if together.is_cheap else group
    return made


_ALONE = re.compile(r"\(\?(?![a-z-]*:|[=!>]|<[=!])|\\[1-9]")
"""Flags, names and numbers of groups: what means something else beside another pattern."""
_AT_ONCE = 24


@functools.lru_cache(maxsize=4096)
def expression(pattern: str) -> Expression:
    """The `Expression` of a pattern, made once."""
    return Expression(pattern)


class MatchingTime:
    """The time that one list of patterns may take, however many names are asked about."""

    def __init__(self) -> None:
        self._spent = 0.0

    def each(self, patterns: Iterable[T]) -> Iterator[T]:
        """The patterns; raises `UnboundedPatternError` between two of them when the time is over."""
        begin = time.thread_time()
        try:
            for number, pattern in enumerate(patterns):
                if number % 64 == 0:
                    self._check(time.thread_time() - begin)
                yield pattern
        finally:
            self._spent += time.thread_time() - begin

    def _check(self, more: float) -> None:
        if self._spent + more > MAX_SECONDS:
            raise UnboundedPatternError(
                f"takes more than {MAX_SECONDS:g} s to be matched with the names of modules; simplify its patterns"
            )


def _check_folding(tree: Any) -> None:
    """Raise for ranges of many characters in any case, which `re` writes down one by one."""
    folded = bool(tree.state.flags & re.IGNORECASE)
    ranges = 0
    for operation, argument in _all(tree):
        folded |= operation is _parser.SUBPATTERN and bool(argument[1] & re.IGNORECASE)
        if operation is _parser.IN:
            ranges += sum(value[1] - value[0] for kind, value in argument if kind is _parser.RANGE)
    if folded and ranges > _FOLDED_RANGE:
        raise UnboundedPatternError(f"has ranges of {ranges:,} characters in any case")


def _all(tree: Any) -> Iterator[tuple[Any, Any]]:
    for operation, argument in tree:
        yield operation, argument
        for inner in _inner(operation, argument):
            yield from _all(inner)


def _inner(operation: Any, argument: Any) -> tuple[Any, ...]:
    """The trees inside a part of one."""
    if operation in _REPEATS:
        return (argument[2],)
    if operation is _parser.BRANCH:
        return tuple(argument[1])
    if operation is _parser.SUBPATTERN:
        return (argument[3],)
    if operation in (_parser.ASSERT, _parser.ASSERT_NOT):
        return (argument[1],)
    if operation is _parser.ATOMIC_GROUP:
        return (argument,)
    if operation is _parser.GROUPREF_EXISTS:
        return tuple(tree for tree in argument[1:] if tree is not None)
    return ()


def _sequence(tree: Any, length: int) -> _Cost:
    """The most that matching `tree` at one place of a text of `length` costs in `re`."""
    steps, ways = 0.0, 1.0
    for operation, argument in tree:
        each = _cost(operation, argument, length)
        steps, ways = steps + ways * each.steps, ways * each.ways
    return _Cost(steps, ways)


def _cost(operation: Any, argument: Any, length: int) -> _Cost:
    if operation in _ONE_CHARACTER or operation is _parser.AT:
        return _Cost(1, 1)
    if operation is _parser.GROUPREF:
        return _Cost(length, 1)
    inner = [_sequence(tree, length) for tree in _inner(operation, argument)]
    if not inner:
        return _Cost(_ENDLESS, _ENDLESS)
    if operation in _REPEATS:
        return _repeated(operation, argument, inner[0], length)
    steps = 1 + sum(each.steps for each in inner)
    if operation in (_parser.ASSERT, _parser.ASSERT_NOT, _parser.ATOMIC_GROUP):  # not gone back into
        return _Cost(steps, 1)
    if operation is _parser.GROUPREF_EXISTS:
        return _Cost(steps, 1 + sum(each.ways for each in inner))
    return _Cost(steps, sum(each.ways for each in inner))


def _repeated(operation: Any, argument: Any, body: _Cost, length: int) -> _Cost:
    low, high, tree = argument
    width = tree.getwidth()[0]
    most = min(int(high), length // width if width else int(high))
    if most > length:
        return _Cost(_ENDLESS, _ENDLESS)
    steps, ways, at_once = body.steps + 1, 0.0, 1.0
    for count in range(most + 1):
        ways += at_once if count >= min(low, most) else 0
        if count < most:
            steps, at_once = steps + at_once * (body.steps + 1), at_once * body.ways
        if steps > MAX_STEPS or ways > MAX_STEPS:
            return _Cost(_ENDLESS, _ENDLESS)
    return _Cost(steps, 1 if operation is _parser.POSSESSIVE_REPEAT else ways)


class _Positions:
    """A tree on one text; a set of positions is an integer whose bit i stands for the place before character i."""

    def __init__(self, tree: Any, text: str, singles: dict[Hashable, re.Pattern[str]]) -> None:
        self._tree, self._text, self._singles = tree, text, singles
        self._found: dict[Hashable, int] = {}
        self._steps = 0

    def ends(self) -> int:
        """Where a match that begins at the start of the text can end."""
        return self._sequence(self._tree, 1, (0, 0))

    def _sequence(self, tree: Any, starts: int, flags: tuple[int, int]) -> int:
        for operation, argument in tree:
            if not starts:
                return 0
            starts = self._after(operation, argument, starts, flags)
        return starts

    def _after(self, operation: Any, argument: Any, starts: int, flags: tuple[int, int]) -> int:
        self._steps += 1
        if self._steps > MAX_SETS:
            raise UnboundedPatternError(f"takes too many steps for the name {self._text[:80]!r}; simplify it")
        if operation in _ONE_CHARACTER:
            return (starts & self._where(operation, argument, flags)) << 1
        if operation is _parser.AT:
            return starts & self._where(operation, argument, flags)
        if operation is _parser.SUBPATTERN:
            _, added, removed, inner = argument
            return self._sequence(inner, starts, ((flags[0] | added) & ~removed, (flags[1] | removed) & ~added))
        if operation is _parser.BRANCH:
            return functools.reduce(int.__or__, (self._sequence(tree, starts, flags) for tree in argument[1]))
        if operation in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):
            return self._repeat(argument, starts, flags)
        if operation in (_parser.ASSERT, _parser.ASSERT_NOT):
            return self._assert(operation is _parser.ASSERT, argument, starts, flags)
        raise UnboundedPatternError(
            f"has a part ({str(operation).lower()}) that has to be matched by going back, beside others that make "
            f"this take very long; leave it away"
        )

    def _repeat(self, repeat: Any, starts: int, flags: tuple[int, int]) -> int:
        low, high, tree = repeat
        for _ in range(int(low)):
            before, starts = starts, self._sequence(tree, starts, flags)
            if starts in (0, before):
                break
        ends = fresh = starts
        for _ in range(int(high) - int(low)):
            fresh = self._sequence(tree, fresh, flags) & ~ends
            if not fresh:
                break
            ends |= fresh
        return ends

    def _assert(self, wanted: bool, assertion: Any, starts: int, flags: tuple[int, int]) -> int:
        direction, tree = assertion
        width = 0 if direction > 0 else tree.getwidth()[0]
        held = 0
        for position in _bits(starts):
            ends = self._sequence(tree, 1 << (position - width), flags) if position >= width else 0
            if (bool(ends) if direction > 0 else bool(ends >> position & 1)) is wanted:
                held |= 1 << position
        return held

    def _where(self, operation: Any, argument: Any, flags: tuple[int, int]) -> int:
        """The positions before a character that one part means, or those that an anchor means."""
        key = operation, id(argument) if operation is _parser.IN else argument, flags
        found = self._found.get(key)
        if found is None:
            single = self._singles.get(key)
            if single is None:
                single = self._singles[key] = self._alone((operation, argument), flags)
            found = self._found[key] = sum(1 << match.start() for match in single.finditer(self._text))
        return found

    def _alone(self, part: tuple[Any, Any], flags: tuple[int, int]) -> re.Pattern[str]:
        """One part as an expression: what it means is up to `re`."""
        state = self._tree.state
        group = (_parser.SUBPATTERN, (None, *flags, _parser.SubPattern(state, [part])))
        compiled: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [group]), state.flags)
        return compiled


def _bits(positions: int) -> Iterator[int]:
    """The positions in a set."""
    while positions:
        yield (positions & -positions).bit_length() - 1
        positions &= positions - 1
