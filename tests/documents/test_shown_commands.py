"""Every command of README.md and docs/ that is not marked runs here, on the demo model under the names it is given."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantload import cli, load_quantized
from quantload.checkpoint.resolve import resolve
from quantload.cli import DEMO_MODEL
from quantload.server import ServerState
from quantload.server import command as server_command
from quantload.server.load_progress import LoadProgress
from quantload.tokenizer import load_processor
from range_server import RangeServer
from server_harness import running
from shown_code import BLOCKS, Block, quantload_arguments

pytestmark = pytest.mark.slow
SHELL = [block for block in BLOCKS if block.kind == "command"]
CURL = [block for block in SHELL if any(words[0] == "curl" for words in block.commands)]
REMOTE = ("s3://", "gs://", "az://", "https://", "--stream")


@pytest.mark.parametrize("block", [block for block in SHELL if block not in CURL], ids=str)
def test_commands_end_well(
    block: Block, in_named_files: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("bucket") if any(each in block.text for each in REMOTE) else None
    served: list[str] = []
    monkeypatch.setattr(server_command, "serve", until_it_could_answer(served))
    monkeypatch.setattr(server_command, "check_processor", lambda *given: None)  # in a process of its own: seconds
    asked = 0
    for words in block.commands:
        arguments = quantload_arguments(words)
        assert arguments
        arguments = [str(in_named_files) if argument == "/checkpoints" else argument for argument in arguments]
        if arguments[0] == "convert":  # the demo model has 16 MB, and a size above that leaves nothing to convert
            arguments = ["8MiB" if argument == "16GiB" else argument for argument in arguments]
        if server is not None:
            arguments = from_here(arguments, server)
            shutil.rmtree(server.root / "quantized", ignore_errors=True)
        shutil.rmtree(in_named_files / "OUT", ignore_errors=True)  # each line of a block is a choice
        monkeypatch.setattr(sys, "argv", ["quantload", *arguments])
        assert exit_code() == 0, arguments
        asked += arguments[0] == "serve"
        assert (
            arguments[0] != "convert" or (Path("OUT") / "config.json").exists() or "s3://bucket/quantized" in arguments
        )
    assert len(served) == asked


def exit_code() -> int | str | None:
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def from_here(arguments: list[str], server: RangeServer) -> list[str]:
    """A command with S3 for all object stores, this server for a web server, and its repository for one of the hub."""
    changes = {"gs://bucket": "s3://bucket", "https://host": server.url}
    if "--stream" in arguments:
        changes["Qwen/Qwen3-30B-A3B"] = "org/Qwen3-30B-A3B"
    for old, new in changes.items():
        arguments = [argument.replace(old, new) for argument in arguments]
    return arguments


def until_it_could_answer(served: list[str]) -> Callable[..., None]:
    """`serve` without a port: the load and the tokenizer, and then it is told to stop."""

    def serve(load: Callable[..., Any], processor: Callable[[], Any], *, model_name: str, **given: Any) -> None:
        model = load(LoadProgress(), threading.Event())
        assert model.load_report.state == "complete"
        assert processor() is not None
        served.append(model_name)

    return serve


@pytest.mark.parametrize("block", CURL, ids=str)
def test_the_demo_server_answers_the_requests_that_are_shown(block: Block) -> None:
    state = ServerState("quantload-demo")
    checkpoint = resolve(DEMO_MODEL)
    state.finish(load_quantized(checkpoint, "quark_mxfp4"), load_processor(checkpoint, False))
    with running(state) as client:
        for words in block.commands:
            path, headers, body = of_curl(words)
            reply = client.post(path, body.encode(), **headers)
            assert reply.status == 200, reply.text
            answers = reply.events[:-1] if json.loads(body).get("stream") else [reply.json]
            choices = [choice for each in answers for choice in each["choices"]]
            assert "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)


def of_curl(words: list[str]) -> tuple[str, dict[str, str], str]:
    """Path, headers and body of a command of curl that posts to the port that `serve` takes by default."""
    address, headers, body = "", {}, ""
    rest = iter(words[1:])
    for word in rest:
        if word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = next(rest)
        elif word.startswith("-"):
            assert set(word[1:]) <= set("sN"), f"{word} is not known here"
        else:
            address = word
    assert address.startswith("localhost:8000/"), address
    return address.removeprefix("localhost:8000"), headers, body


def test_a_request_is_taken_from_a_command_of_curl() -> None:
    words = ["curl", "-sN", "localhost:8000/v1/x", "-H", "content-type: application/json", "-d", "{}"]
    assert of_curl(words) == ("/v1/x", {"content-type": "application/json"}, "{}")
