"""Which modules a list of names and expressions means."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.errors import CheckpointError
from quantload.schemes import expressions
from quantload.schemes.stored.patterns import Patterns, Prefixes

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


MANY = [
    "re:a",
    "re:(a)",
    r"re:(.)\1",
    "re:(?i)A.B$",
    "re:(?P<x>b)",
    "*.c",
    "m?del*",
    "re:x|y",
    "[xy].*",
    "re:(?<=q)a|ab$",
    "re:.*",
]


@given(st.lists(st.sampled_from(MANY[:-1]), max_size=9), st.sampled_from([*NAMES, "aa", "A.b", "x.c", "abc"]))
def test_many_patterns_that_are_asked_together_mean_what_each_means(patterns: list[str], name: str) -> None:
    wanted = next((each for each in patterns if Patterns([each], "here", globs=True).first(name)), None)
    assert Patterns(patterns, "here", globs=True).first(name) == wanted


def test_hundreds_of_patterns_take_microseconds_a_module() -> None:
    patterns = Patterns([f"model.layers.{number}.self_attn*" for number in range(300)], "here", globs=True)
    begin = time.thread_time()
    assert not any(patterns.first(f"model.layers.{number}.mlp.experts.7.up_proj") for number in range(1000))
    assert time.thread_time() - begin < 0.1
    assert patterns.first("model.layers.299.self_attn.q_proj") == "model.layers.299.self_attn*"


SLOW = "(?:a|aa)+" * 3 + "!"


@pytest.mark.parametrize("make", [Patterns, Prefixes])
def test_a_pattern_that_would_go_back_for_years_is_asked_at_once(make: type[Patterns | Prefixes]) -> None:
    begin, patterns = time.thread_time(), make([f"re:{SLOW}" if make is Patterns else SLOW], "here")
    assert patterns.first("a" * 200) is None
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize("make", [Patterns, Prefixes])
def test_patterns_that_take_too_long_together_are_an_error(
    make: type[Patterns | Prefixes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "MAX_SECONDS", 0.002)
    patterns = make([f"re:.*{number}.*!" if make is Patterns else f".*{number}.*!" for number in range(40)], "here")
    with pytest.raises(CheckpointError, match=r"^config\.json: here takes more than .* to be matched with the names"):
        any(patterns.first(f"{number}" * 60) for number in range(1000))


def test_what_a_config_says_is_shown_with_the_reason() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: here has 're:\(b', which is not a regular expression"):
        Patterns(["re:(b"], "here")
    with pytest.raises(
        CheckpointError, match=r"config\.json: here has 're:\(a\*\)\*.*1b', which has a part \(groupref"
    ):
        Patterns([r"re:(a*)*\1b"], "here").first("a" * 300)
