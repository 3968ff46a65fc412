"""What CI looks at besides the tests: the files of the wheel, and known vulnerabilities."""

from __future__ import annotations

import audit
import pytest
from wheel_files import differences

TRACKED = ["README.md", "loader/load.py", "loader/kernels", "loader/demo_model/config.json", "kernels/cpu/x.py"]
HELD = ["quantload/load.py", "quantload/demo_model/config.json", "quantload/kernels/cpu/x.py"]
METADATA = ["quantload-0.1.0.dist-info/METADATA", "quantload-0.1.0.dist-info/licenses/LICENSE"]


def test_a_wheel_of_the_tracked_files_is_right() -> None:
    assert differences(HELD + METADATA, TRACKED) == []


@pytest.mark.parametrize(
    "name",
    ["quantload/.env", "tests/x.py", "kernels/cpu/x.py", "quantload/demo_model/training_args.bin", "evil.pth",
     "quantload-0.1.0.dist-info/evil.py", "quantload-0.1.0.data/scripts/x"],
)  # fmt: skip
def test_a_file_more_is_surprising(name: str) -> None:
    assert differences([*HELD, name], TRACKED) == [f"surprising: {name}"]


def test_a_file_less_is_missing() -> None:
    assert differences(HELD[1:], TRACKED) == ["missing: quantload/load.py"]


VULNERABLE = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]}


@pytest.mark.parametrize(
    ("packages", "accepted", "code", "said"),
    [
        ([VULNERABLE], {}, 1, "a 1: X-1, mended in 2"),
        ([VULNERABLE], {"CVE-1": "never called"}, 0, "1 of 1 packages were audited"),
        ([{"name": "b", "version": "1", "vulns": []}], {}, 0, "1 of 1 packages were audited"),
        ([{"name": "b", "skip_reason": "not found"}], {}, 0, "not audited, there is no data of them here: b"),
        ([{"name": "b", "skip_reason": "not found"}, VULNERABLE], {}, 1, "1 of 2 packages were audited"),
    ],
)
def test_a_known_vulnerability_ends_the_run(
    packages: list[dict[str, object]], accepted: dict[str, str], code: int, said: str
) -> None:
    found, lines = audit.verdict({"dependencies": packages}, accepted)
    assert found == code
    assert any(said in line for line in lines)
