"""Ready means ready: what requests compile was compiled before the server said so."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import quantload
from quantload import LoadOptions, load_quantized
from quantload.checkpoint.resolve import resolve
from quantload.errors import LoadCancelledError
from quantload.kernels.cpu import build
from quantload.kernels.cpu.compiled import Compiled, Recipe
from quantload.server import ServerState
from quantload.server.warm_up import warm_up
from quantload.tokenizer import load_processor
from server_harness import Client, running

DEMO = Path(quantload.__file__).parent / "demo_model"
LENGTHS = (*range(1, 18), 31, 32, 33, 40, 63, 64, 65, 127, 128, 129, 200, 300)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are made in this test, as if none had been made in this process before."""
    for found in pkgutil.iter_modules(build.__path__):
        for value in vars(importlib.import_module(f"{build.__name__}.{found.name}")).values():
            if isinstance(value, Compiled):
                monkeypatch.setattr(value, "_made", {})
    names: list[str] = []
    compile_ = Recipe.compile

    def compile_and_note(self: Any) -> Any:
        names.append(self.function.__qualname__)
        return compile_(self)

    monkeypatch.setattr(Recipe, "compile", compile_and_note)
    return names


def ask(client: Client) -> None:
    for length in LENGTHS:
        reply = client.post("/v1/completions", {"prompt": "a\n" * (length // 2) + "b" * (length % 2), "max_tokens": 2})
        assert reply.status == 200, reply.text


@pytest.mark.parametrize(
    ("scheme", "batched"),
    [
        ("quark_mxfp4", False),
        pytest.param("quark_mxfp4", True, marks=pytest.mark.slow),
        *(pytest.param(scheme, False, marks=pytest.mark.slow) for scheme in ("int4_per_group", "fp8_per_block",
          "fp8_per_channel", "int8_per_channel", "nvfp4", "mxfp8", "mxfp6_e2m3", "mxfp4_rows", "quark_int4fp8_moe")),
    ],
)  # fmt: skip
def test_a_request_of_any_length_finds_its_kernels_made(scheme: str, batched: bool, made: list[str]) -> None:
    model = load_quantized(DEMO, scheme, options=LoadOptions(stats=False))
    state = ServerState("demo", continuous_batching=batched)
    before = len(made)
    state.finish(model, load_processor(resolve(DEMO), False), warm_up)
    assert len(made) > before
    warmed = list(made)
    with running(state) as client:
        ask(client)
        client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    assert made == warmed


def test_health_says_what_a_load_is_doing(model: Any, tokenizer: Any) -> None:
    state = ServerState("tiny")
    seen: list[Any] = []
    assert state.health()[1]["phase"] == "reading the tokenizer"

    def look(served: Any, cancel: threading.Event) -> None:
        seen.append(state.health())
        warm_up(served, cancel)

    state.finish(model, tokenizer, look)
    ((status, body),) = seen
    assert (status, body["status"], body["phase"]) == (503, "loading", "warming up")
    assert state.health()[0] == 200


def test_it_warms_up_no_longer_than_it_is_wanted(model: Any, tokenizer: Any) -> None:
    state = ServerState("tiny")
    state.cancel.set()
    with pytest.raises(LoadCancelledError):
        state.finish(model, tokenizer, warm_up)
    assert state.health()[0] == 503


def test_a_model_that_cannot_generate_is_not_served(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        ServerState("tiny").finish(model, tokenizer, warm_up)


SCRIPT = """
import json, sys
from pathlib import Path
from quantload import LoadOptions, load_quantized
from quantload.checkpoint.resolve import resolve
from quantload.server import ServerState
from quantload.tokenizer import load_processor
from quantload.server.warm_up import warm_up
sys.path.insert(0, sys.argv[2])
from server_harness import running
from test_server_warm_up import DEMO, ask

def kernels():
    return sorted(path.name for path in Path(sys.argv[1]).rglob("*.nbc"))

state = ServerState("demo")
model = load_quantized(DEMO, "quark_mxfp4", options=LoadOptions(stats=False))
loaded = kernels()
state.finish(model, load_processor(resolve(DEMO), False), warm_up)
warmed = kernels()
with running(state) as client:
    ask(client)
print(json.dumps([len(loaded), len(warmed), len(kernels())]))
"""


@pytest.mark.slow
def test_with_an_empty_cache_of_kernels_no_request_compiles(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    loaded, warmed, asked = json.loads(output.splitlines()[-1])
    assert loaded < warmed == asked
