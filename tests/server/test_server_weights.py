"""Exchanging the weights of a model while it is served: from a folder, and as a trainer sends them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing import shared_memory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantload import load_quantized
from quantload.errors import PolicyError
from quantload.memory.metrics import LoadMetrics
from quantload.server import ServerState, create_app
from quantload.server import weights as weights_module
from quantload.server.openapi import description
from quantload.server.weights import WeightRoutes
from safetensors.torch import load_file, save
from server_harness import Client, Reply, running_app, wait_for
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

KEY = {"authorization": "Bearer key"}
JSON = {**KEY, "content-type": "application/json"}
PROMPT = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}


@dataclass
class Served:
    """A server over a model of `root/old`; `root/new` has other weights."""

    client: Client
    root: Path
    state: ServerState
    new: dict[str, Tensor]

    def post(self, path: str, body: Any = None) -> Reply:
        return self.client.post(path, body, **(KEY if isinstance(body, bytes) else JSON))

    def text(self) -> str:
        reply = self.post("/v1/completions", PROMPT)
        assert reply.status == 200, reply.text
        return str(reply.json["choices"][0]["text"])

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics", **KEY).text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name)))


@pytest.fixture(scope="module")
def folders(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any) -> Path:
    root = Path(tmp_path_factory.mktemp("weights"))
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    for name, each in (("old", model), ("new", other)):
        each.save_pretrained(root / "root" / name)
        tokenizer.save_pretrained(root / "root" / name)
    return root / "root"


@pytest.fixture
def served(folders: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Served]:
    metrics = LoadMetrics()
    state = ServerState("tiny", metrics=metrics)
    state.finish(load_quantized(folders / "old", "int8", progress=False), tokenizer)
    app = create_app(state, "key", weights=WeightRoutes(folders, True, metrics))
    with running_app(app) as client:
        yield Served(client, folders, state, load_file(folders / "new" / "model.safetensors"))


def expected(served: Served) -> str:
    """What a server of the new weights answers."""
    state = ServerState("tiny")
    tokenizer: Any = served.state.served().manager.processor
    state.finish(load_quantized(served.root / "new", "int8", progress=False), tokenizer)
    with running_app(create_app(state, "key")) as client:
        return str(client.post("/v1/completions", PROMPT, **JSON).json["choices"][0]["text"])


def test_a_reload_from_a_folder(served: Served) -> None:
    before = served.text()
    reply = served.post("/reload", {"checkpoint": "new"})
    assert reply.status == 200, reply.text
    assert reply.json["state"] == "complete"
    assert (
        reply.json.keys()
        == description("1", ["/reload"])["components"]["schemas"]["WeightsExchanged"]["properties"].keys()
    )
    assert served.text() == expected(served) != before
    assert served.client.get("/load_report", **KEY).json["model"] == str(served.root / "new")
    assert served.metric('quantload_reloads_total{result="success"}') == 1
    assert served.metric("quantload_reload_seconds_total") > 0


def test_what_is_not_below_the_root_is_refused(served: Served, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    links = {"link": outside, "inside/model.safetensors": served.root / "new" / "model.safetensors"}
    for link, target in {**links, "inside/config.json": Path("/etc/hostname")}.items():
        place = served.root / link
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)
    wrong: list[Any] = ["..", ".", "", "nothing", "../root/new", str(outside), "new/config.json", "link", "inside", 3]
    for name in wrong:
        reply = served.post("/reload", {"checkpoint": name})
        assert reply.status == 400, (name, reply.text)
        assert str(outside) not in reply.text
    assert served.client.get("/health").json["status"] == "ok"


def test_it_takes_the_key(served: Served) -> None:
    for path in ("/reload", "/start_weight_update", "/update_weights", "/finish_weight_update"):
        assert served.client.post(path, {}).status == 401
    with pytest.raises(PolicyError, match="only with an API key"):
        create_app(ServerState("tiny"), weights=WeightRoutes(served.root, False))
    with pytest.raises(PolicyError, match="which is no folder"):
        WeightRoutes(served.root / "new" / "config.json", False)
    paths = {getattr(route, "path", "") for route in create_app(ServerState("tiny"), "key").routes}
    assert not paths & {"/reload", "/update_weights"}


def test_requests_under_way_are_answered_with_the_old_weights_and_others_wait(served: Served) -> None:
    before, after = served.text(), expected(served)
    held = served.state.admission.enter()  # a request that is under way
    answers: list[Any] = []
    reloading = threading.Thread(target=lambda: answers.append(served.post("/reload", {"checkpoint": "new"}).status))
    reloading.start()
    wait_for(lambda: served.state.admission._closed)
    waiting = threading.Thread(target=lambda: answers.append(served.text()))
    waiting.start()
    wait_for(lambda: served.state.admission._waiting)
    assert served.post("/reload", {"checkpoint": "new"}).status == 409
    assert answers == []
    held.leave()
    served.client.get("/health")  # which has the event loop look
    reloading.join(30)
    waiting.join(30)
    assert sorted(map(str, answers)) == sorted(["200", after])
    assert after != before
    wait_for(lambda: served.state.admission.under_way == 0)


@pytest.mark.parametrize("shared", [False, True])
def test_a_trainer_sends_weights(served: Served, shared: bool) -> None:
    before, after = served.text(), expected(served)
    assert served.post("/update_weights", b"x").status == 409
    assert served.post("/start_weight_update").json == {"message": "Weight update started"}
    assert served.post("/start_weight_update").status == 409
    assert served.client.get("/health").json["status"] == "reloading"
    names = list(served.new)
    for part in (names[::2], names[1::2]):
        data = save({name: served.new[name] for name in part})
        if shared:
            block = shared_memory.SharedMemory(create=True, size=len(data))
            try:
                assert block.buf is not None
                block.buf[: len(data)] = data
                size = block.size
                reply = served.post("/update_weights", {"update_info": {"shared_memory": block.name}})
                assert size == len(data)
            finally:
                block.close()
                block.unlink()
        else:
            reply = served.post("/update_weights", data)
        assert (reply.status, reply.json) == (200, {"message": "Weights updated"})
    reply = served.post("/finish_weight_update", {"weight_version": "7"})
    assert (reply.status, reply.json["state"]) == (200, "complete")
    assert served.text() == after != before


def test_a_failed_update_is_told_and_repaired(served: Served) -> None:
    after = expected(served)
    served.post("/start_weight_update")
    bad = {name: tensor.clone() for name, tensor in served.new.items()}
    bad["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    reply = served.post("/update_weights", save(bad))
    assert (reply.status, reply.json["error"]["code"]) == (400, "reload_failed")
    health = served.client.get("/health")
    assert (health.status, health.json["status"]) == (503, "unhealthy")
    assert "up_proj" in health.json["error"]
    refused = served.post("/v1/completions", PROMPT)
    assert (refused.status, refused.json["error"]["code"]) == (503, "weights_incomplete")
    assert served.metric('quantload_reloads_total{result="failure"}') == 1
    assert served.post("/reload", {"checkpoint": "new"}).status == 200
    assert served.text() == after


def test_an_update_that_nobody_goes_on_with_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "IDLE_SECONDS", 0.05)
    before = served.text()
    served.post("/start_weight_update", {"partial": True})
    assert served.text() == before  # it waited until then
    assert served.metric('quantload_reloads_total{result="cancelled"}') == 1


def test_bodies_that_are_not_understood(served: Served) -> None:
    for path, body in (
        ("/reload", {}),
        ("/reload", {"checkpoint": "new", "path": "/etc"}),
        ("/reload", [1]),
        ("/start_weight_update", {"partial": "yes"}),
    ):
        assert served.post(path, body).status == 400, path
    served.post("/start_weight_update", {"partial": True})
    assert served.post("/update_weights", {"shared_memory": "../etc/passwd"}).status == 400
    assert served.post("/update_weights", {"shared_memory": "nothing-of-this-name"}).status == 400
    assert served.client.get("/health").json["status"] == "ok"  # what failed has ended the update
    served.post("/start_weight_update", {"partial": True})
    assert served.post("/update_weights", b"no safetensors file at all").status == 400
    assert served.client.get("/health").json["status"] == "ok"


def test_a_request_that_is_cancelled_lets_nobody_at_the_weights_before_its_thread_has_ended() -> None:
    given: Any = SimpleNamespace(root=None, metrics=None)
    exchange = weights_module._Exchange(given, given)
    began, goes_on = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        began.set()
        goes_on.wait(60)
        order.append("worked")

    async def release(result: str) -> None:
        order.append(result)

    async def cancelled() -> None:
        asking = asyncio.create_task(exchange._do(work))
        await asyncio.to_thread(began.wait, 60)
        asking.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert order == []
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asking

    exchange._release = release  # type: ignore[method-assign]
    asyncio.run(cancelled())
    assert order == ["worked", "failure"]
