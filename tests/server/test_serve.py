from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from quantload.server import BindError, serve
from quantload.server.binding import bind_socket
from server_harness import Client, wait_for

PROGRAM = """
import logging, sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer
from quantload.server import serve

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
folder, go = sys.argv[1:]

def load(progress, cancel):
    progress(1, 4)
    while not cancel.wait(0.02):
        try:
            open(go).close()
        except FileNotFoundError:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        return model
    raise SystemExit("cancelled")

serve(load, lambda: AutoTokenizer.from_pretrained(folder), model_name="tiny", port=0, shutdown_grace=1)
print("clean")
"""


def no_model(progress: Any, cancel: threading.Event) -> Any:
    raise AssertionError("the model must not be loaded")


def test_from_start_to_sigterm(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tmp_path, tmp_path / "go"], stdout=subprocess.PIPE, stderr=stderr
        )
    try:
        wait_for(lambda: "Listening" in log.read_text(), 120)
        found = re.search(r"Listening on (http://127\.0\.0\.1:(\d+)), loading tiny", log.read_text())
        assert found
        client = Client(int(found[2]))
        wait_for(lambda: client.get("/health").json.get("progress") == 0.25)
        assert client.get("/health").status == 503
        (tmp_path / "go").touch()
        wait_for(lambda: client.get("/health").status == 200)
        assert [line for line in log.read_text().splitlines() if "requests" not in line][-1].endswith(
            f"Serving tiny at {found[1]}"
        )
        answer = client.post("/v1/completions", {"prompt": "the", "max_tokens": 3}).json
        assert answer["usage"]["completion_tokens"] == 3

        stream = client.open(
            "POST", "/v1/completions", {"prompt": "the", "max_tokens": 400, "stream": True}
        ).getresponse()
        stream.readline()
        process.send_signal(signal.SIGTERM)
        *_, failure, done = stream.read().decode().strip().split("\n\n")
        assert "the server is stopping" in failure
        assert done == "data: [DONE]"
        assert process.wait(100) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"clean\n"
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_load(sig: signal.Signals) -> None:
    cancelled = threading.Event()

    def load(progress: Any, cancel: threading.Event) -> Any:
        os.kill(os.getpid(), sig)
        assert cancel.wait(10)
        cancelled.set()
        raise RuntimeError("cancelled")

    before = signal.getsignal(sig)
    start = time.monotonic()
    serve(load, lambda: None, model_name="tiny", port=0)
    assert cancelled.is_set()
    assert time.monotonic() - start < 8
    assert signal.getsignal(sig) is before
    assert not [thread for thread in threading.enumerate() if thread.name == "quantload-load"]


@pytest.mark.parametrize("where", ["model", "processor"])
def test_a_failed_load_ends_the_server_with_its_error(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError(f"the {where} is broken")

    load, processor = (fail, lambda: None) if where == "model" else (no_model, fail)
    with pytest.raises(ValueError, match=f"the {where} is broken"):
        serve(load, processor, model_name="tiny", port=0)
    assert f"Loading tiny failed: the {where} is broken" in caplog.text


def test_a_failed_load_can_stay_visible() -> None:
    loading = threading.Event()

    def fail(*_: Any) -> Any:
        loading.set()
        raise ValueError("broken")

    def watch() -> None:
        assert loading.wait(10)
        client = Client(port)
        wait_for(lambda: client.get("/health").status == 500)
        os.kill(os.getpid(), signal.SIGTERM)

    with bind_socket("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(ValueError, match="broken"):
        serve(fail, lambda: None, model_name="tiny", port=port, exit_on_load_error=False)
    watcher.join()


def test_a_busy_port_is_known_before_anything_is_loaded() -> None:
    with bind_socket("127.0.0.1", 0) as bound, pytest.raises(BindError):
        serve(no_model, lambda: None, model_name="tiny", port=bound.getsockname()[1])


@pytest.mark.parametrize(("host", "key", "warned"), [("0.0.0.0", None, True), ("0.0.0.0", "k", False)])
def test_an_open_server_without_a_key_is_warned_of(
    host: str, key: str | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("enough")

    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="enough"):
        serve(fail, lambda: None, model_name="tiny", host=host, port=0, api_key=key)
    assert ("no API key" in caplog.text) == warned
