"""Which modules a list of names and expressions means."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.schemes.stored.patterns import Prefixes

NAMES = ["a", "a.b", "a.bc", "a.b.c", "x.a", "x.a.b", "ab", "b.a", "model.a.b"]
PATTERNS = ["a", "a.b", "b", "x", "a.", ".*b", "(a|x)", r"\w", "m.del", "c$"]


def one_by_one(patterns: list[str], name: str) -> str | None:
    """The rule, as it is said."""
    for pattern in patterns:
        if re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(f".{pattern}"):
            return pattern
    return None


@given(st.lists(st.sampled_from(PATTERNS), max_size=5), st.sampled_from(NAMES))
def test_the_first_of_many_is_the_first_that_means_a_module_alone(patterns: list[str], name: str) -> None:
    assert Prefixes(patterns, "here").first(name) == one_by_one(patterns, name)


@pytest.mark.parametrize(
    ("pattern", "name", "means"), [("a.b", "a.b.c", True), ("a.b", "a.bc", False), ("b", "x.b", True)]
)
def test_a_name_means_what_is_below_it_and_what_ends_with_it(pattern: str, name: str, means: bool) -> None:
    assert Prefixes([pattern], "here").first(name) == (pattern if means else None)
