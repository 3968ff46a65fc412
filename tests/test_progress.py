"""Who is told how far a load is."""

from __future__ import annotations

import io
import sys

import pytest
from quantload.progress import showing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_function_is_called_as_it_is() -> None:
    def told(done: int, total: int) -> None: ...

    with showing(told, "loading") as progress:
        assert progress is told


@pytest.mark.parametrize(
    ("asked", "stream", "shown"),
    [
        (None, Terminal, True), (None, io.StringIO, False), (True, io.StringIO, True), (False, Terminal, False),
    ],
)  # fmt: skip
def test_a_bar_is_shown_where_somebody_looks_or_it_is_asked_for(
    asked: bool | None, stream: type[io.StringIO], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    with showing(asked, "loading") as progress:
        assert (progress is not None) == shown
        if progress is not None:
            progress(5 << 20, 10 << 20)
            progress(10 << 20, 10 << 20)
    assert bool(written.getvalue()) == shown


def test_what_the_load_raises_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), showing(True, "loading"):
        raise KeyError("x")
