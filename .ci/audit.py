"""Ask pip-audit for known vulnerabilities of installed packages, and say what could not be asked.

    python .ci/audit.py REQUIREMENTS

`REQUIREMENTS` has a line NAME==VERSION for each package. Exit code 1 if any has a vulnerability that `ACCEPTED` does
not name. Where the index has no such data, as mirrors have none, that is said, and the exit code is 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ACCEPTED: Mapping[str, str] = {}
"""Vulnerabilities by their id, with the reason why they do not matter here."""


def verdict(report: Mapping[str, Any], accepted: Mapping[str, str] = ACCEPTED) -> tuple[int, list[str]]:
    """Exit code and lines for what pip-audit said, in its JSON."""
    packages = report["dependencies"]
    unasked = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version'}"
        for package in packages
        for vulnerability in package.get("vulns", ())
        if not {vulnerability["id"], *vulnerability.get("aliases", ())} & set(accepted)
    ]
    lines = [f"vulnerable: {line}" for line in found]
    if unasked:
        lines.append(f"not audited, there is no data of them here: {', '.join(unasked)}")
    lines.append(f"{len(packages) - len(unasked)} of {len(packages)} packages were audited")
    return int(bool(found)), lines


def main(requirements: str) -> int:
    """Run pip-audit, which is installed beside this Python."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", requirements, "--no-deps", "--disable-pip"]
    asked = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    try:
        report = json.loads(asked.stdout)
    except ValueError:
        print(f"not audited, pip-audit said: {asked.stderr.strip().splitlines()[-1:]}")
        return 0
    code, lines = verdict(report)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
