"""Runs the tests of the files that a change touches, the closest ones first, until the time is up."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 45
"""Until when a test may begin, from the first static check: the last one may take long."""
MOST_FILES = 20
"""Files of tests that are looked at: more could not even be imported in time."""
TWO_PROCESSES_FROM = 8
"""Files of tests from which a second process is worth its start."""
CONTRACT = ("tests/test_import_contract.py",)
"""What every change of the package may break."""
SOURCES = {"loader": "quantload", "kernels": "quantload.kernels"}


@dataclass(frozen=True)
class Suite:
    """The test files of a checkout, by what they are near to."""

    root: Path

    @cached_property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob("tests/**/test_*.py"))

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Every name that a file of tests asks for, by file: modules, and names in modules."""
        return {name: set(imported(self.root / name)) for name in self.files}

    @cached_property
    def texts(self) -> dict[str, str]:
        return {name: (self.root / name).read_text() for name in self.files}

    def of(self, changed: str) -> list[str]:
        """The files of tests that a changed file concerns, the closest first; none where none is known to."""
        path = Path(changed)
        if path.suffix != ".py":
            mentioned = path.name if path.suffix else changed
            return [name for name in self.files if mentioned in self.texts[name]]
        if path.parts[0] == "tests" and path.name == "conftest.py":
            return self._in(path.parent)
        if path.parts[0] == "tests":
            return [changed] if changed in self.files else self._importing(path.stem)
        folder = mirror(path)
        named = [name for name in self._in(folder) if f"_{path.stem}_" in f"{Path(name).stem}_"]
        near = [*named, *self._importing(module_of(path))]
        found = sorted(near, key=lambda name: distance(Path(name), folder)) or self._in(folder)
        return list(dict.fromkeys([*found[:1], *(CONTRACT if path.parts[0] in SOURCES else ()), *found[1:]]))

    def _in(self, folder: Path) -> list[str]:
        return [name for name in self.files if Path(name).is_relative_to(folder)]

    def _importing(self, module: str) -> list[str]:
        return [name for name in self.files if module in self.imports[name]]


def imported(path: Path) -> Iterable[str]:
    """The absolute names that a file imports, inside functions too: `a.b` and `a.b.c` for `from a.b import c`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """The name by which tests import a source file: `loader/a/b.py` is `quantload.a.b`, `bench/b.py` is `b`."""
    folder, *inner = path.with_suffix("").parts
    start = [SOURCES[folder]] if folder in SOURCES else []
    return ".".join([*start, *(inner[:-1] if inner[-1:] == ["__init__"] else inner)])


def mirror(path: Path) -> Path:
    """The folder of tests for a source file; `schemes/stored` and other folders in a folder share their parent's."""
    inner = path.parent.parts if path.parts[0] != "loader" else path.parent.parts[1:]
    return Path("tests", *inner[:1])


def distance(tests: Path, mirror: Path) -> int:
    """How far a file of tests is from the folder that mirrors a source; whole loads test everything, and take long."""
    if tests.parent == mirror:
        return 0
    return 3 if "end_to_end" in tests.parts else 1 if tests.is_relative_to(mirror) else 2


def changed_since(base: str | None) -> list[str]:
    """Tracked files that differ from a commit, and files git does not know yet; not those that are gone."""
    if base is None:
        base = next((fork for ref in ("main", "origin/main") if (fork := _git("merge-base", "HEAD", ref))), ["HEAD"])[0]
    differing = _git("diff", "--name-only", "--diff-filter=d", base)
    if differing is None:
        raise SystemExit(f"git knows no commit {base!r}")
    return sorted({*differing, *(_git("ls-files", "--others", "--exclude-standard") or [])})


def _git(*arguments: str) -> list[str] | None:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.splitlines() if run.returncode == 0 else None


def chosen(suite: Suite, changed: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files of tests to run, in order, and the changed files that no test is known to concern.

    First the tests that changed, then in turns the closest test of every other file, the second closest, and so on.
    """
    lists = {name: suite.of(name) for name in changed}
    depth = max(map(len, lists.values()), default=0)
    turns = [found[turn] for turn in range(depth) for found in lists.values() if turn < len(found)]
    first = [name for name in lists if name in suite.files]
    return list(dict.fromkeys([*first, *turns])), [name for name, found in lists.items() if not found]


def main() -> int:
    """Choose and run; the exit status is pytest's, and 0 where there is nothing to run."""
    parser = argparse.ArgumentParser(prog=".ci/quick")
    parser.add_argument("--base", help="a commit to compare with; default: where this branch left main")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of wall time, static checks included")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="only say which tests would run")
    parser.add_argument("files", nargs="*", help="changed files, relative to the root of the repository")
    asked = parser.parse_args()

    files, without = chosen(Suite(ROOT), asked.files or changed_since(asked.base))
    for name in without:
        print(f"no test is known to concern {name}")
    if asked.list or not files:
        print("\n".join(files) or "no tests to run")
        return 0
    if files[MOST_FILES:]:
        print("left out, others are closer:", *files[MOST_FILES:])
    del files[MOST_FILES:]
    command = [sys.executable, "-m", "pytest", "-q", "-r", "fE", "-p", "time_limit", "--seconds-left"]
    command += [str(asked.started + asked.seconds - time.time())]
    command += ["-n", "2" if len(files) >= TWO_PROCESSES_FROM else "0", *files]
    paths = [str(ROOT / ".ci"), *filter(None, [os.environ.get("PYTHONPATH")])]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False)
    return 0 if status.returncode == 5 else status.returncode  # 5: all of them are marked slow, timing or compat


if __name__ == "__main__":
    sys.exit(main())
