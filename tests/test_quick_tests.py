"""`.ci/quick` runs the tests that are near to a change, the closest first, and says which it had no time for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from quick_tests import ROOT, Suite, changed_since, chosen

FILES = {
    "tests/test_import_contract.py": "",
    "tests/end_to_end/test_bad_options.py": "",
    "tests/test_options.py": "from quantload.options import LoadOptions",
    "tests/pieces/test_plain.py": "from quantload.pieces.plain import plan_pieces",
    "tests/pieces/test_slabs.py": "from stored_experts import experts",
    "tests/pieces/stored_experts.py": "",
    "tests/schemes/test_stored_quark.py": "def test() -> None:\n    from quantload.pieces import plain",
    "tests/schemes/test_packaging.py": "TABLE = 'README.md'",
    "tests/kernels/test_mxfp4_rows.py": "from quantload.kernels.cpu.ir.mx import decode",
    "tests/kernels/test_kernel_mx.py": "import quantload.kernels.registry",
    "tests/bench/test_bench_cache.py": "import cache",
}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Suite(tmp_path)


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("tests/pieces/test_slabs.py", ["pieces/test_slabs"]),
        ("tests/pieces/stored_experts.py", ["pieces/test_slabs"]),
        ("tests/pieces/conftest.py", ["pieces/test_plain", "pieces/test_slabs"]),
        ("loader/options.py", ["test_options", "test_import_contract", "end_to_end/test_bad_options"]),
        ("loader/pieces/plain.py", ["pieces/test_plain", "test_import_contract", "schemes/test_stored_quark"]),
        ("loader/pieces/cuts.py", ["pieces/test_plain", "test_import_contract", "pieces/test_slabs"]),
        ("loader/schemes/stored/quark.py", ["schemes/test_stored_quark", "test_import_contract"]),
        ("kernels/cpu/ir/mx.py", ["kernels/test_kernel_mx", "test_import_contract", "kernels/test_mxfp4_rows"]),
        ("bench/cache.py", ["bench/test_bench_cache"]),
        ("README.md", ["schemes/test_packaging"]),
        (".ci/md", []),
        (".ci/cache.py", ["bench/test_bench_cache"]),
        ("loader/convert/flow.py", ["test_import_contract"]),
        ("docs/nowhere.md", []),
    ],
)
def test_a_changed_file_has_its_mirror_and_what_imports_it(suite: Suite, changed: str, tests: list[str]) -> None:
    assert suite.of(changed) == [f"tests/{name}.py" for name in tests]


def test_changed_tests_run_first_then_the_closest_of_every_other_file(suite: Suite) -> None:
    changed = ["loader/pieces/plain.py", "bench/cache.py", "docs/nowhere.md", "tests/pieces/test_slabs.py"]
    files, without = chosen(suite, changed)
    assert files == [
        "tests/pieces/test_slabs.py",
        "tests/pieces/test_plain.py",
        "tests/bench/test_bench_cache.py",
        "tests/test_import_contract.py",
        "tests/schemes/test_stored_quark.py",
    ]
    assert without == ["docs/nowhere.md"]


def test_a_commit_git_does_not_know_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no commit 'never'"):
        changed_since("never")


@pytest.mark.parametrize("processes", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_what_has_not_begun_in_time_is_left_out_and_named(tmp_path: Path, processes: str) -> None:
    in_time, late = (_run_two_tests(tmp_path, seconds, processes) for seconds in ("3600", "0"))
    assert in_time.returncode == 1, in_time.stdout
    assert "1 failed, 1 passed" in in_time.stdout
    assert "left out" not in in_time.stdout
    assert late.returncode == 0, late.stdout
    assert "2 skipped" in late.stdout
    assert "left out for lack of time: 2 of test_two.py" in late.stdout


def _run_two_tests(folder: Path, seconds: str, processes: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_two.py").write_text("def test_first(): pass\ndef test_second(): raise AssertionError\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", processes, "-p", "time_limit", "--seconds-left", seconds],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / ".ci"), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
