"""Write constraints.txt: the versions of this environment, in which the suite has passed.

    .venv/bin/python .ci/constraints.py

Every direct dependency of pyproject.toml, extras included, and what they drag in that has broken something before.
Fails where one is not installed or lies outside its range, and where Triton is not the one that torch's builds for GPUs
ask for: they could not be installed with these constraints.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
DRAGGED_IN = ("anyio", "click", "fsspec", "hf-xet", "llvmlite", "pydantic-core", "starlette", "sympy", "tokenizers")
"""Not asked for by name, but their versions have decided whether something worked."""
TRITON_OF_TORCH = {"2.13.0": "3.7.1", "2.14.1": "3.8.0"}
"""What the builds for GPUs require, by the version of torch; the one for CPUs does not say."""
HEADER = """\
# Versions the test suite has passed with. Written by .ci/constraints.py; the ranges are in pyproject.toml.
"""


def direct_dependencies() -> dict[str, Requirement]:
    """What pyproject.toml asks for, by canonical name; its own extras are followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return {canonicalize_name(each.name): each for each in found if each.name != project["name"]}


def pins() -> dict[str, Version]:
    """The public versions installed here; raises `SystemExit` for what is missing or outside its range."""
    direct, wrong = direct_dependencies(), []
    found: dict[str, Version] = {}
    for name in sorted([*direct, *DRAGGED_IN]):
        try:
            found[name] = Version(Version(version(name)).public)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if name in direct and found[name] not in direct[name].specifier:
            wrong.append(f"{name} is {found[name]}, the range is {direct[name].specifier}")
    torch, triton = str(found.get("torch")), str(found.get("triton"))
    if TRITON_OF_TORCH.get(torch) != triton:
        wrong.append(
            f"triton is {triton}, and torch {torch} for GPUs needs {TRITON_OF_TORCH.get(torch, 'one not known here')}"
        )
    if wrong:
        raise SystemExit("constraints.txt is left as it is: " + "; ".join(wrong))
    return found


def main() -> None:
    """Write the file beside pyproject.toml."""
    lines = [f"{name}=={pinned}\n" for name, pinned in pins().items()]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines))
    print(f"{len(lines)} versions, python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
