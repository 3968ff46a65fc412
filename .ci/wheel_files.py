"""Compare what a wheel holds with what git tracks: nothing more, and nothing missing.

python .ci/wheel_files.py WHEEL
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
METADATA = re.compile(
    r"quantload-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt|licenses/LICENSE)"
)
PLACES = {"loader/": "quantload/", "kernels/": "quantload/kernels/"}


def expected_files(tracked: Iterable[str]) -> set[str]:
    """What a wheel must hold of the files that git tracks: all of both folders, under the package's name."""
    return {
        PLACES[top] + name.removeprefix(top)
        for name in tracked
        for top in PLACES
        if name.startswith(top) and name != "loader/kernels"  # which is a link to the other one
    }


def differences(held: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """A line for each file that the wheel should not have, or lacks."""
    names, expected = {name for name in held if not METADATA.fullmatch(name)}, expected_files(tracked)
    surprising = [f"surprising: {name}" for name in sorted(names - expected)]
    return surprising + [f"missing: {name}" for name in sorted(expected - names)]


def main(wheel: str) -> int:
    """Say the differences of a wheel; 1 if there are any."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    lines = differences(held, listed.stdout.split("\0"))
    print("\n".join(lines) or f"the wheel holds {len(held)} files, all of them expected")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
