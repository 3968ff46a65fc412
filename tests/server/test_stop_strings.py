from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.server.stop_strings import StopMatcher, first_stop


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_fragments_end_where_the_whole_text_ends(fragments: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    passed = "".join(map(matcher.feed, fragments)) + matcher.flush()
    whole = "".join(fragments)
    # In fragments, the stop string that is complete first wins; in the whole text, the one that begins first.
    ends = [end for end in (first_stop(whole[:size], stops) for size in range(len(whole) + 1)) if end is not None]
    assert passed in {whole[: first_stop(whole, stops)], whole[: ends[0] if ends else None]}
    assert matcher.stopped == bool(ends)


@pytest.mark.parametrize(
    ("fragments", "passed"), [(["one", "\n"], ["one", ""]), (["a\n", "b"], ["a", "\nb"]), (["x\n\ny"], ["x"])]
)
def test_only_a_possible_beginning_is_held_back(fragments: list[str], passed: list[str]) -> None:
    matcher = StopMatcher(["\n\n"])
    assert [matcher.feed(fragment) for fragment in fragments] == passed


def test_what_was_held_back_comes_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the EN") == "the "
    assert matcher.flush() == "EN"
