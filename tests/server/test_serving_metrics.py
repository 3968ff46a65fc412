"""What `/metrics` says of a server: right numbers, few labels, names with their units."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from quantload.cli import serve_options
from quantload.memory import metrics as load_metrics
from quantload.server import ServerState, request_log
from quantload.server.serving_metrics import ServingMetrics
from server_harness import Client, running, wait_for

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(client: Client) -> Samples:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found[(f"quantload_{name}", tuple(sorted(labels.items())))]


@pytest.fixture
def fresh(model: Any, tokenizer: Any) -> Any:
    state = ServerState("tiny")
    state.finish(model, tokenizer)
    with running(state) as client:
        yield client


def test_requests_and_tokens_are_counted(fresh: Client) -> None:
    for stream in (False, True):
        assert fresh.post("/v1/completions", {"prompt": "the fox", "max_tokens": 5, "stream": stream}).status == 200
    usage = fresh.post("/v1/completions", {"prompt": "the fox", "max_tokens": 1}).json["usage"]
    fresh.post("/v1/completions", {"prompt": 3})
    fresh.get("/nowhere")
    wait_for(lambda: 'route="other"' in fresh.get("/metrics").text)
    found = samples(fresh)
    route = "/v1/completions"
    assert value(found, "requests_total", route=route, status="200") == 3
    assert value(found, "requests_total", route=route, status="400") == 1
    assert value(found, "request_seconds_count", route=route) == 4
    assert value(found, "prompt_tokens_total") == 3 * usage["prompt_tokens"]
    assert value(found, "completion_tokens_total") == 11
    assert value(found, "time_to_first_token_seconds_count") == 3
    assert value(found, "queue_seconds_count") == 3
    assert value(found, "time_per_output_token_seconds_count") == 2  # one token alone has no time between
    assert 0 < value(found, "time_to_first_token_seconds_sum") < value(found, "request_seconds_sum", route=route)
    assert value(found, "requests_running") == value(found, "requests_waiting") == 0


def test_tokens_are_those_that_the_client_is_told_of(fresh: Client) -> None:
    """Of several prompts and several answers to each, prompts count once."""
    body = {"prompt": ["the fox", "the lazy dog"], "n": 2, "max_tokens": 3, "temperature": 1, "ignore_eos": True}
    usage = fresh.post("/v1/completions", body).json["usage"]
    wait_for(lambda: value(samples(fresh), "completion_tokens_total") == 12)
    assert usage["completion_tokens"] == 12
    assert value(samples(fresh), "prompt_tokens_total") == usage["prompt_tokens"]


def test_running_and_waiting_requests_are_seen(fresh: Client, model: Any) -> None:
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(fresh.post, "/v1/completions", {"prompt": "the", "max_tokens": 9}) for _ in range(3)]
            wait_for(lambda: value(samples(fresh), "requests_waiting") == 2)
            assert value(samples(fresh), "requests_running") == 1
            assert {reply.result().status for reply in asked} == {200}
    finally:
        handle.remove()
    wait_for(lambda: value(samples(fresh), "requests_running") == value(samples(fresh), "requests_waiting") == 0)


def test_what_strangers_ask_for_makes_no_labels(fresh: Client) -> None:
    before = len(samples(fresh))
    for index in range(30):
        fresh.get(f"/{index}")
        fresh.post("/v1/completions", {"model": f"m{index}", "prompt": "x"})
    labels = {label for _, pairs in samples(fresh) for label in pairs if label[0] in ("route", "status", "model")}
    assert labels == {
        ("route", "/metrics"), ("route", "/v1/completions"), ("route", "other"),
        ("status", "200"), ("status", "404"), ("model", "tiny"),
    }  # fmt: skip
    assert len(samples(fresh)) < before + 80


def test_the_process_the_model_and_the_version_are_named(fresh: Client) -> None:
    from quantload import __version__

    found = samples(fresh)
    assert value(found, "model_info", model="tiny", version=__version__) == 1
    assert 1 << 20 < found[("process_resident_memory_bytes", ())] < 1 << 40
    assert {"process_cpu_seconds_total", "process_start_time_seconds"} <= {name for name, _ in found}


def test_a_system_without_proc_has_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: False)
    text = ServingMetrics("tiny").render().decode()
    monkeypatch.undo()
    names = {line.split()[0] for line in ServingMetrics("tiny").render().decode().splitlines() if "process_" in line}
    alone = {line.split()[0] for line in text.splitlines() if line.startswith("process_")}
    assert "process_resident_memory_bytes" in alone
    assert "process_cpu_seconds_total" in alone
    assert alone <= names


def test_units_are_in_the_names(fresh: Client) -> None:
    for family in text_string_to_metric_families(fresh.get("/metrics").text):
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert family.name.startswith(("quantload_", "process_"))


def test_a_continuous_batch_counts_its_tokens(model: Any, tokenizer: Any) -> None:
    state = ServerState("tiny", continuous_batching=True)
    state.finish(model, tokenizer)
    with running(state) as client:
        for stream in (False, True):
            body = {"prompt": "the fox", "max_tokens": 6, "stream": stream}
            assert client.post("/v1/completions", body).status == 200
        wait_for(lambda: value(samples(client), "completion_tokens_total") == 12)
        found = samples(client)
        assert value(found, "time_to_first_token_seconds_count") == 2
        assert value(found, "prompt_tokens_total") > 2


def test_the_choices_of_the_command_line_are_those_of_the_server() -> None:
    assert get_args(serve_options.RequestLogMode) == get_args(request_log.RequestLogMode)
    assert get_args(serve_options.LayerMetrics) == get_args(load_metrics.LayerMetrics)
