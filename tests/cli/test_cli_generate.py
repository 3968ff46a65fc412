"""`quantload generate` prints an answer and nothing else on standard output."""

from __future__ import annotations

import json

import pytest
from quantload.cli import app
from typer.testing import CliRunner

PROMPT = "def read_lines(path):\n"


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["generate", "-p", PROMPT, "--max-new-tokens", "8", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_it_prints_the_text_or_one_object_that_tells_all_of_it() -> None:
    told = json.loads(run("--temperature", "0", "--json"))
    plain = CliRunner().invoke(app, ["generate", "-p", PROMPT, "--max-new-tokens", "8", "--temperature", "0"])
    assert plain.stdout == f"{told['text']}\n"
    assert "cut off after 8 tokens: --max-new-tokens" in plain.stderr
    assert (told["tokens"], told["finish_reason"], told["is_chat"]) == (8, "length", True)
    assert (told["quantization"], told["world_size"]) == ("quark_mxfp4", 1)


def test_the_seed_that_was_drawn_gives_the_same_again() -> None:
    told = json.loads(run("--temperature", "1", "--json", "--load-format", "dummy"))
    again = json.loads(run("--temperature", "1", "--json", "--load-format", "dummy", "--seed", str(told["seed"])))
    assert again["text"] == told["text"]


@pytest.mark.parametrize("arguments", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--seed", "-1"], []])
def test_what_makes_no_sense_is_a_usage_error(arguments: list[str]) -> None:
    given = ["-p", PROMPT, *arguments] if arguments else []
    assert CliRunner().invoke(app, ["generate", *given]).exit_code == 2
