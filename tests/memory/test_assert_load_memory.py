"""The assertion as a function, and as the fixture that the pytest plugin brings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quantload.errors import PolicyError, QuantloadError
from quantload.memory import LoadReport, MemoryLog, TimelinePoint, assert_load_memory

pytest_plugins = ["pytester"]

GIB = 1 << 30

QUANTLOAD_LOG = """\
INFO quantload: Peak CPU memory before loading weights: 0.300 GiB
INFO quantload: Memory increase during load_weights: 5.000 GiB
INFO quantload: Peak CPU memory during load_weights: 6.000 GiB (final 5.000 GiB, staging 0.031 GiB)
"""
SGLANG_LOG = """\
[2026-02-26 05:24:00 TP0] Peak GPU memory before loading weights: 0.500 GiB
[2026-02-26 05:24:00 TP1] Peak GPU memory before loading weights: 0.500 GiB
[2026-02-26 05:24:09 TP0] Memory increase during load_weights: 6.000 GiB
[2026-02-26 05:24:10 TP1] Memory increase during load_weights: 5.000 GiB
"""


def report(with_timeline: bool = True) -> LoadReport:
    points = [TimelinePoint(0.0, 0, 0), TimelinePoint(1.0, 9, 5 * GIB)] if with_timeline else []
    return LoadReport("demo", "none", "cpu", 1.0, 9, 9, 5 * GIB, 6 * GIB, 1, 0, 5 * GIB, 6 * GIB, timeline=points)


EVIDENCE = {
    "log": QUANTLOAD_LOG,
    "parsed log": MemoryLog(peak_bytes=6 * GIB, increase_bytes=5 * GIB),
    "report": report(),
    "report without timeline": report(with_timeline=False),
    "report dict": report().to_dict(),
    "report JSON": json.dumps(report().to_dict(), indent=1),
    "JSON log": "".join(json.dumps({"message": line}) + "\n" for line in QUANTLOAD_LOG.splitlines()),
}


@pytest.mark.parametrize("evidence", EVIDENCE.values(), ids=EVIDENCE)
def test_every_form_is_held_to_its_limits(evidence: object) -> None:
    """Peak 6 GiB and increase 5 GiB, whatever they come in; a limit that is just met is not below."""
    assert_load_memory(evidence, peak_below=6 * GIB + 1, increase_below="5.1 GiB")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"peak memory of .* is 6\.000 GiB .* not below 6\.000 GiB .* 0 B over"):
        assert_load_memory(evidence, peak_below="6GiB")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"increase memory of .* is 5\.000 GiB .* not below 4\.500 GiB"):
        assert_load_memory(evidence, peak_below="7GiB", increase_below="4.5 GiB")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["log", "report JSON"])
def test_files_are_read(tmp_path: Path, kind: type, name: str) -> None:
    path = tmp_path / "of a load.txt"
    path.write_text(str(EVIDENCE[name]))
    assert_load_memory(kind(path), peak_below="6.1GiB")
    with pytest.raises(AssertionError):
        assert_load_memory(kind(path), peak_below="6GiB")


def test_sglang_peak_is_before_plus_increase_on_every_rank() -> None:
    assert_load_memory(SGLANG_LOG, peak_below="6.501 GiB", increase_below="6.001 GiB")
    with pytest.raises(AssertionError) as caught:
        assert_load_memory(SGLANG_LOG, peak_below="6.4 GiB")
    assert "load 1 of 2 on rank TP0 is 6.500 GiB" in str(caught.value)
    assert "TP1" not in str(caught.value)


def test_an_earlier_load_over_the_limit_fails_too() -> None:
    """A small draft model that loads after the large one must not hide it."""
    draft = QUANTLOAD_LOG.replace("6.000", "1.000")
    with pytest.raises(AssertionError, match=r"load 1 of 2 is 6\.000 GiB"):
        assert_load_memory(QUANTLOAD_LOG + draft, peak_below="2GiB")


def test_both_limits_are_reported_together() -> None:
    with pytest.raises(AssertionError, match=r"(?s)peak memory.*\n.*increase memory"):
        assert_load_memory(QUANTLOAD_LOG, peak_below=1, increase_below=1)


def test_missing_numbers_never_pass() -> None:
    with pytest.raises(PolicyError, match="nothing to check"):
        assert_load_memory(QUANTLOAD_LOG)
    with pytest.raises(PolicyError, match="'lots' is not an amount"):
        assert_load_memory(QUANTLOAD_LOG, peak_below="lots")
    with pytest.raises(QuantloadError, match="no load in this log"):
        assert_load_memory("nothing\nhere", peak_below="1GiB")
    with pytest.raises(QuantloadError, match=r"starts with 'no_such_file\.json'.* a path that exists"):
        assert_load_memory("no_such_file.json", peak_below="1GiB")
    with pytest.raises(FileNotFoundError):
        assert_load_memory(Path("no_such_file.json"), peak_below="1GiB")
    with pytest.raises(QuantloadError, match="the log has no peak"):
        assert_load_memory("Memory increase during load_weights: 5.0 GiB\n", peak_below="1GiB")
    with pytest.raises(QuantloadError, match="no load"):
        assert_load_memory('{"model": "truncated', peak_below="1GiB")
    with pytest.raises(PolicyError, match="got int"):
        assert_load_memory(5, peak_below="1GiB")  # type: ignore[arg-type]
    with pytest.raises(QuantloadError, match="not a load report"):
        assert_load_memory({"peak_bytes": 3}, peak_below="1GiB")


def test_fixture_works_in_a_users_session(pytester: pytest.Pytester) -> None:
    """The plugin is found through its entry point, without anything in the user's conftest."""
    pytester.makepyfile(
        f"""
        LOG = {QUANTLOAD_LOG!r}

        def test_below(assert_load_memory):
            assert_load_memory(LOG, peak_below="17 GiB", increase_below="6 GiB")

        def test_above(assert_load_memory):
            assert_load_memory(LOG, peak_below="5 GiB")
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["E *AssertionError: peak memory of the load is 6.000 GiB*not below 5.000 GiB*1.000 GiB over"]
    )
    result.stdout.no_fnmatch_line("*assertions.py*")


def test_plugin_costs_a_session_nothing() -> None:
    """Every pytest session on a machine with quantload imports the plugin: no torch, and next to no time."""
    code = (
        "import sys, pytest; before = set(sys.modules); import quantload.memory.pytest_plugin;"
        "print(*sorted(name for name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"quantload", "quantload.memory", "quantload.memory.pytest_plugin", "__future__"}
