"""Who is told how far a load is."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from quantload import load_quantized, recording
from quantload.cli import DEMO_MODEL
from quantload.progress import Moment, showing, watcher_of


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


def drawn(moments: list[Moment], monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", **environment}.items():
        monkeypatch.setenv(name, value)
    with showing(True, "loading") as progress:
        watcher = watcher_of(progress)
        assert watcher is not None
        for moment in moments:
            watcher.watch(moment)
            watcher._bar.refresh()  # type: ignore[attr-defined]
    return written.getvalue()


def test_the_bar_says_phase_bytes_speed_memory_and_time_left_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    reading = [Moment("stream", 2.0 + s, s * gib, 57 * gib, s * gib // 4, 17 * gib, 16 * gib) for s in range(8)]
    said = drawn([Moment("resolve", 0.0), Moment("compile", 1.0), *reading], monkeypatch)
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", said).replace("\r", "\n").splitlines() if line]
    assert max(map(len, lines)) <= 80
    text = "".join(lines)
    for part in ("loading: resolve", "loading: compile", "7.0/57.0 GiB", "1.0 GiB/s", "mem 1.8/16.0 GiB", "12%"):
        assert part in text


def test_no_color_means_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [Moment("stream", 1.0, 1 << 20, 1 << 30)]
    colours = re.compile(r"\x1b\[(\d+;)*(3[0-8]|4[0-8]|9[0-7])[;m]")
    assert colours.search(drawn(moments, monkeypatch))
    assert not colours.search(drawn(moments, monkeypatch, NO_COLOR="1"))


def test_a_long_load_says_in_the_log_how_far_it_is_where_no_bar_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "SECONDS_A_LINE", 0.0)
    caplog.set_level(logging.INFO)
    load_quantized(DEMO_MODEL, "none", progress=False)
    assert re.search(r"Loading: 0\.01 of 0\.01 GiB read in \d+ s \(\d+\.\d\d GiB/s\), memory", caplog.text)
    caplog.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    load_quantized(DEMO_MODEL, "none", progress=True)
    assert "Loading:" not in caplog.text
