"""constraints.txt goes with the ranges in pyproject.toml, and the README's commands use it."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`.ci/constraints.py`."""
    spec = importlib.util.spec_from_file_location("constraints", ROOT / ".ci" / "constraints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def direct(script: ModuleType) -> dict[str, Requirement]:
    """What pyproject.toml asks for, extras included."""
    found: dict[str, Requirement] = script.direct_dependencies()
    return found


def pinned() -> Iterator[tuple[str, Version]]:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==(\S+)", line).groups()  # type: ignore[union-attr]
            yield name, Version(version)


def test_every_direct_dependency_has_one_pin_inside_its_range(direct: dict[str, Requirement]) -> None:
    pins = list(pinned())
    assert len(pins) == len(dict(pins))
    assert {"torch", "transformers", "fastapi", "pytest", "ruff"} <= set(direct)
    assert set(direct) <= set(dict(pins))
    outside = {name: str(pin) for name, pin in pins if name in direct and pin not in direct[name].specifier}
    assert outside == {}


def test_what_is_pinned_beside_them_is_what_the_script_says(script: ModuleType, direct: dict[str, Requirement]) -> None:
    assert set(dict(pinned())) == {*direct, *script.DRAGGED_IN}


def test_a_pin_can_be_had_from_every_index(script: ModuleType) -> None:
    """No local version, such as 2.13.0+cpu, and the Triton that torch's builds for GPUs bring."""
    pins = dict(pinned())
    assert all(pin.local is None for pin in pins.values())
    assert script.TRITON_OF_TORCH[str(pins["torch"])] == str(pins["triton"])


def test_every_range_has_two_ends(direct: dict[str, Requirement]) -> None:
    for requirement in direct.values():
        assert {clause.operator for clause in requirement.specifier} == {">=", "<"}, requirement


@pytest.mark.parametrize(
    ("name", "versions"),
    [("torch", ["2.14.0", "2.14.1"]), ("transformers", ["5.16.0", "5.19.0"]), ("numba", ["0.65.0", "0.65.1"])],
)
def test_the_versions_that_vllm_and_sglang_pin_are_allowed(
    name: str, versions: list[str], direct: dict[str, Requirement]
) -> None:
    assert all(version in direct[name].specifier for version in versions)


def test_triton_is_for_the_tests_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    assert [extra for extra, texts in lists.items() if any(text.startswith("triton") for text in texts)] == ["test"]


def test_the_commands_that_people_copy_install_with_the_constraints() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        installs = re.findall(r"pip install (.*?)(?: &&|$)", (ROOT / document).read_text(), flags=re.MULTILINE)
        of_ours = [arguments for arguments in installs if "'.[" in arguments]
        assert of_ours
        assert all(arguments.startswith("-c constraints.txt ") for arguments in of_ours), document
