"""What is installed is what is in the folders, and nothing in it belongs to one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"loader": "quantload", "kernels": "quantload.kernels"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    """Folders that hold Python files, as packages; the symlink is not followed."""
    found = set()
    for top, package in SOURCES.items():
        for file in (ROOT / top).glob("**/*.py"):
            parts = file.relative_to(ROOT / top).parent.parts
            if not (top == "loader" and parts[:1] == ("kernels",)):
                found.add(".".join((package, *parts)))
    return found


def tracked() -> list[str]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-s", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [entry for entry in listed.stdout.split("\0") if entry]


def test_the_packages_are_the_folders(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk())
    assert len(listed) == len(set(listed))


def test_every_folder_of_the_loader_is_a_regular_package_and_kernels_is_none() -> None:
    for package in packages_on_disk():
        if package.startswith("quantload.kernels"):
            continue
        folder = ROOT.joinpath("loader", *package.split(".")[1:])
        assert (folder / "__init__.py").is_file(), folder
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_folders_are_mapped_under_one_name(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["package-dir"] == {v: k for k, v in SOURCES.items()}


def test_the_link_to_the_kernels_is_committed() -> None:
    link = ROOT / "loader" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    assert any(entry.startswith("120000 ") and entry.endswith("\tloader/kernels") for entry in tracked())


def test_package_data_is_there_and_small_enough(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]["quantload"]
    for pattern in patterns:
        assert list((ROOT / "loader").glob(pattern)), pattern
    demo = ROOT / "loader" / "demo_model"
    names = {path.name for path in demo.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "generation_config.json"} <= names
    assert sum(path.stat().st_size for path in demo.glob("*.safetensors")) <= 16_000_000
    assert "py.typed" in patterns


def test_the_command_and_the_plugin(project: dict[str, Any]) -> None:
    assert project["project"]["scripts"] == {"quantload": "quantload.cli:program"}
    assert project["project"]["entry-points"]["pytest11"] == {"quantload": "quantload.memory.pytest_plugin"}


def test_nothing_depends_on_the_other_aiter(project: dict[str, Any]) -> None:
    """The package of that name on PyPI is an asyncio library."""
    required = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        required += extra
    assert not [name for name in required if re.match(r"(amd-)?aiter\b", name)]


# Written in parts, so that this file does not hold what it looks for.
MACHINE_PATHS = [f"/{folder}/" for folder in ("work", "root", "home")] + [f"/tmp/{letter}/" for letter in "w"]


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    guilty = []
    for entry in tracked():
        path = ROOT / entry.partition("\t")[2]
        if path.is_symlink() or not path.is_file() or path.suffix in (".safetensors", ".npz"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        guilty += [
            f"{path.relative_to(ROOT)}: {bad}" for bad in MACHINE_PATHS if re.search(rf"(?<![\w.$}}]){bad}", text)
        ]
    assert guilty == []


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their bare names."""
    names = [path.name for path in (ROOT / "tests").glob("**/test_*.py")]
    assert sorted(names) == sorted(set(names))
