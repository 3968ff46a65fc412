"""Names, paths and addresses in requests make the server open no file and no connection."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from server_harness import Client

WATCHED = ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system",
           "import", "exec", "os.posix_spawn", "os.exec")  # fmt: skip


class Watch:
    """What this process opens, connects to, imports or runs while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # which cannot be taken away again

    def _hook(self, event: str, arguments: Any) -> None:
        if self.on and event in WATCHED:
            self.seen.append(f"{event} {arguments}")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("s3cret")
    return tmp_path / "secret"


NAMES = (
    "{path}", "file://{path}", "../../{path}", "{folder}", "org/model", "org/model@main", "tiny@main", "tiny/",
    "tiny:{path}", "tiny:model.gguf", "https://127.0.0.1:{port}/x", "hf://org/model", "~/x", "TINY", "tiny\x00", "",
)  # fmt: skip


def requests(name: str) -> list[tuple[str, dict[str, Any] | None]]:
    """All there is that takes a name, a path or an address."""
    hello = [{"role": "user", "content": "the"}]
    media = {"image_url": {"url": name}, "video_url": {"url": name}, "audio_url": {"url": name},
             "input_audio": {"data": name, "format": "wav"}}  # fmt: skip
    return [
        ("/v1/completions", {"model": name, "prompt": "the"}),
        ("/v1/chat/completions", {"model": name, "messages": hello}),
        ("/tokenize", {"model": name, "prompt": "the"}),
        ("/load_model", {"model": name}),
        (f"/v1/models/{quote(name or 'x', safe='')}", None),
        *(
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}]})
            for kind, value in media.items()
        ),
        ("/v1/chat/completions", {"messages": hello, "chat_template_kwargs": {"chat_template": name}}),
        ("/v1/chat/completions", {"messages": hello, "chat_template": name}),
        ("/v1/completions", {"prompt": "the", "lora": name}),
        ("/v1/completions", {"prompt": "the", "generation_config": name}),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_request_names_is_not_opened(name: str, client: Client, watch: Watch, secret: Path) -> None:
    named = name.format(path=secret, folder=secret.parent, port=client.port)
    asked = requests(named)
    for path, body in asked:  # once before, for what is imported on the way
        client.get(path) if body is None else client.post(path, body)
    watch.seen.clear()
    for path, body in asked:
        watch.on = True
        reply = client.get(path) if body is None else client.post(path, body)
        watch.on = False
        if (path, named) != ("/tokenize", ""):
            assert 400 <= reply.status < 500, (path, body, reply.text)
        assert "s3cret" not in reply.text
    own = ("socket.connect", "socket.getaddrinfo")
    assert not [each for each in watch.seen if not (each.startswith(own) and "'127.0.0.1'" in each)]
    connections = [each for each in watch.seen if each.startswith("socket.connect")]
    assert len(connections) == len(asked)  # those of this client


def test_the_watch_sees_what_it_is_for(watch: Watch, secret: Path) -> None:
    watch.seen.clear()
    watch.on = True
    secret.read_text()
    watch.on = False
    assert str(secret) in watch.seen[0]
