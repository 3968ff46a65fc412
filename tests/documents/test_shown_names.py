"""What documents show has the options, schemes, extras and names that there are, also where it cannot be run here."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import typer.main
from quantload import cli
from quantload.schemes.names import SCHEME_NAMES
from shown_code import BLOCKS, DOCUMENTS, ROOT, Block, blocks_of, quantload_arguments

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SHELL = [block for block in BLOCKS if block.language != "python" and block.kind != "output"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
PROGRAMS_RUN = {"quantload", "curl"}
"""What blocks without a mark may start."""


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_taken_by_the_command_line(block: Block) -> None:
    for words in block.commands:
        given = quantload_arguments(words)
        assert block.kind == "not run" or words[0] in PROGRAMS_RUN, (
            f"{words[0]} is neither run nor marked <!-- not run: REASON -->"
        )
        if given:
            context = COMMANDS[given[0]].make_context(given[0], given[1:])
            assert not context.args


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_schemes_and_extras_that_others_are_given_exist(block: Block) -> None:
    for words in block.commands:
        if "--quantization" in words:
            scheme = words[words.index("--quantization") + 1]
            assert scheme.removeprefix("quantload_") in SCHEME_NAMES
    for extras in re.findall(r"(?:quantload|\.)\[([a-z,]+)\]", block.text):
        assert set(extras.split(",")) <= set(EXTRAS)


OPTIONS_OF_OTHERS = {
    *("--help", "--tp-size", "--ep-size", "--enable-lora", "--lora-target-modules"),
    *("--tables-only", "--minutes", "--out", "--readers", "--only"),
}
"""Options in texts that are of all programs and of engines, and of scripts in bench/."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_texts_exist(document: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    named = {
        option for code in re.findall(r"`([^`]+)`", text) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)
    }
    ours = {
        name for command in COMMANDS.values() for each in command.params for name in (*each.opts, *each.secondary_opts)
    }
    assert named - ours <= OPTIONS_OF_OTHERS


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_its_names_of_quantload_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quantload":
            assert node.module is not None
            if node.module == "quantload.engines.peft":  # imports PEFT, which need not be here
                names = set(re.findall(r"^def (\w+)", (ROOT / "loader/engines/peft.py").read_text(), re.MULTILINE))
            else:
                names = set(dir(importlib.import_module(node.module)))
            assert {alias.name for alias in node.names} <= names


def test_a_mark_gives_a_reason_and_stands_before_its_block() -> None:
    for document in DOCUMENTS:
        marks = re.findall(r"<!-- (?:not run|output)", document.read_text())
        marked = [block for block in blocks_of(document) if block.kind in ("not run", "output")]
        assert len(marks) == len(marked), f"{document}: a mark stands before no block"
        for block in marked:
            named = re.findall(r"(?:tests|\.ci)/[\w./]*\w", block.reason)
            assert block.kind == "output" or named, f"{block}: which test has it instead?"
            assert all((ROOT / name).exists() for name in named), block


def test_the_parts_of_a_command_line_are_taken_apart() -> None:
    text = ".venv/bin/pip install '.[serve]' && .venv/bin/quantload serve  # starts\ncurl -d '{}' \\\n     a\n"
    block = Block(ROOT / "README.md", 1, "", text, "command")
    assert block.commands == [["pip", "install", ".[serve]"], ["quantload", "serve"], ["curl", "-d", "{}", "a"]]
    assert quantload_arguments(["torchrun", "--nproc-per-node", "2", "-m", "quantload", "load"]) == ["load"]


def test_every_fence_belongs_to_a_block() -> None:
    for document in DOCUMENTS:
        fences = re.findall(r"^ *```", document.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(document)), document
