"""Patterns of checkpoints and users mean what `re` makes of them, and none takes long."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantload.schemes import expressions
from quantload.schemes.expressions import Expression, MatchingTime, UnboundedPatternError

ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    r"\w",
    "[ab]",
    "[^a]",
    r"\d",
    "^",
    "$",
    r"\b",
    r"\B",
    "(?i:A)",
    r"\Z",
    r"[\w.]",
    "(?s:.)",
]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?", "??"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        st.sampled_from(["a", r"\.", "[ab]."]).map(lambda one: f"(?<={one})"),
        st.sampled_from(["a", r"\.", "[ab]."]).map(lambda one: f"(?<!{one})"),
    ),
    max_leaves=6,
)


@given(PATTERNS, st.text("ab.1\nA", max_size=7))
@settings(max_examples=400, deadline=None)
@example("(?:a?)*b", "aab")
@example("(?:(?:a|b)*?(?=b))+b", "abab")
def test_without_going_back_it_means_the_same(pattern: str, name: str) -> None:
    made = Expression(pattern)
    for limit in (made._cheap_below, 0):
        made._cheap_below = limit
        assert made.match(name) == (re.match(pattern, name) is not None)
        assert made.fullmatch(name) == (re.fullmatch(pattern, name) is not None)


ORDINARY = [
    r".*self_attn.*", r"model\.layers\.\d+\.mlp\..*", r".*\.experts\.\d+\.(gate|up|down)_proj$", r"^(?!.*experts).*",
    r"^(?!.*(?:vision|audio)).*proj", r"(?:.*\.)?lm_head", r".*mlp\.gate$", r"(?>.*?a)(?>.*?b).*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_left_to_re(pattern: str) -> None:
    assert Expression(pattern)._cheap_below == expressions.ORDINARY_NAME


LONG = "a" * 4000
HOSTILE = [
    "(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*a){20}b", "(?:.*)*(?:.*)*b", r"(\w*)*!", "a*a*a*a*a*a*a*a*a*a*a*b", "(x+x+)+y",
    "((a{0,99}){0,99}){0,99}b", "(?:a?){200}b", "(?=(a+)+b)a", "(?:(?:a*)*)*b", "(?!(?:a|a)*b)c", "(?:a??)+b",
    "a?" * 4000 + "b", "(" * 40 + "a" + ")*" * 40 + "b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("name", ["a" * 40, "a" * 250, LONG, "x" * 60])
def test_no_pattern_goes_on_for_long(pattern: str, name: str) -> None:
    begin, made = time.thread_time(), Expression(pattern)
    with contextlib.suppress(UnboundedPatternError):
        assert not made.match(name)
    assert time.thread_time() - begin < 3


def test_what_re_would_not_finish_is_answered() -> None:
    made = Expression("model(.+)+x(?:a|a)*[01]$")
    assert made.match("model" + "." * 60 + "xaaaa0")
    assert not made.match("model" + "." * 60 + "xaaaa2")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "is not a regular expression (missing )"),
        ("a{99999999999999999999}", "not a regular expression that can be compiled"),
        ("(" * 9000 + ")" * 9000, "not a regular expression that can be compiled"),
        ("a" * (1 << 20), "1,048,576 characters"),
        ("(?i)[\0-\U0010ffff]", "1,114,111 characters in any case"),
        (r"(?i:[\0-\U0010ffff])", "1,114,111 characters in any case"),
    ],
)
def test_what_cannot_be_compiled_is_said(pattern: str, says: str) -> None:
    with pytest.raises(UnboundedPatternError, match=re.escape(says)):
        Expression(pattern)


@pytest.mark.parametrize("pattern", [r"(a*)*\1b", "(?>(?:a|b)*a*)*b", "(?:a*+)*b"])
def test_what_only_going_back_can_match_is_refused_where_it_may_take_long(pattern: str) -> None:
    with pytest.raises(UnboundedPatternError, match="matched by going back"):
        Expression(pattern).match("a" * 40)


def test_a_list_of_patterns_has_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limited, made = MatchingTime(), Expression(".*a.*b")
    assert sum(each.match("a" * 200) for each in limited.each([made] * 100)) == 0
    monkeypatch.setattr(expressions, "MAX_SECONDS", 0.001)
    with pytest.raises(UnboundedPatternError, match=r"more than 0\.001 s to be .* simplify its patterns"):
        any(each.match("a" * 200) for each in limited.each([made] * 100_000))
