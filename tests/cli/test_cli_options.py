"""Every option says what it does, and is the same in all commands that have it."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from quantload import cli
from quantload.cli.load_options import (
    CacheOptions,
    DigestOptions,
    FitOptions,
    ForwardOptions,
    RunOptions,
    StreamOptions,
)
from quantload.cli.model_options import PolicyOptions, RankOptions, SourceOptions
from quantload.cli.options import LogOptions, ModelOptions
from quantload.errors import PolicyError
from quantload.options import LoadOptions, QuantizationPolicy

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
PARAMETERS = [
    pytest.param(parameter, id=f"{name}-{parameter.name}")
    for name, command in COMMANDS.items()
    for parameter in command.params
]


def test_all_commands_are_looked_at() -> None:
    assert {"load", "plan", "serve", "generate", "compare", "eval", "convert", "schemes", "report"} == set(COMMANDS)
    assert len(PARAMETERS) > 80


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_option_and_argument_has_help_that_is_a_sentence(parameter: Any) -> None:
    assert parameter.help
    assert parameter.help.endswith(".")


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_option_shows_its_default_or_is_a_switch(parameter: Any) -> None:
    switch = getattr(parameter, "is_flag", False)
    assert switch or parameter.required or parameter.default is not None or isinstance(parameter.show_default, str)


@pytest.mark.parametrize("option", ["fit", "max_memory", "staging", "chunk", "cache_size", "max_shard_size"])
def test_a_size_shows_a_size_with_its_unit(option: str) -> None:
    parameters = [each for command in COMMANDS.values() for each in command.params if each.name == option]
    assert parameters
    for parameter in parameters:
        assert parameter.metavar == "SIZE"
        assert any(unit in parameter.help for unit in ("KiB", "MiB", "GiB", "GB"))


def test_an_option_is_the_same_in_every_command_that_reads_a_checkpoint() -> None:
    seen: dict[str, tuple[Any, ...]] = {}
    for command in ("load", "plan", "serve", "generate", "compare", "convert"):
        for each in COMMANDS[command].params:
            if each.param_type_name == "option":
                facts = (each.opts, each.help, each.default, each.show_default, each.metavar, each.rich_help_panel)
                assert seen.setdefault(each.name, facts) == facts


def names(command: str) -> set[str]:
    return {parameter.name for parameter in COMMANDS[command].params}


def test_what_commands_have_in_common() -> None:
    of_serve = {"host", "port", "api_key", "api_key_file", "allowed_host", "served_model_name", "continuous_batching"}
    of_serve |= {"request_log", "layer_metrics", "max_queue", "reload_root", "weight_updates"}
    reading = {"page_cache", "connections", "stats"}
    cache = {"cache", "cache_size", "cache_verify"}
    of_generate = {"prompt", "raw", "max_new_tokens", "temperature", "seed", "as_json"}
    assert names("load") - {"as_json", "report", "html"} == names("serve") - of_serve
    assert names("serve") - of_serve == names("generate") - of_generate
    assert names("load") - names("plan") == reading | cache | {
        *("report", "html", "digest", "expert_parallel", "load_format"),
    }
    of_models = {"device", "activations", "threads", "digest", "html", "expert_parallel", "load_format"}
    assert names("load") - names("convert") == of_models | cache | {"context", "requests", "fit_head"}
    assert names("convert") - names("load") == {"out", "checkpoint_format", "max_shard_size", "no_model_card"}


def chosen(
    policy: PolicyOptions, run: RunOptions, digest: bool = False, fitting: FitOptions | None = None
) -> dict[str, Any]:
    return ModelOptions(
        chosen=policy, run=run, source=SourceOptions(), logs=LogOptions(), forward=ForwardOptions(),
        fitting=fitting or FitOptions(),
        stream=StreamOptions(), caching=CacheOptions(), ranks=RankOptions(), proof=DigestOptions(digest=digest),
    ).arguments()  # fmt: skip


def test_what_is_not_said_has_the_defaults_of_python() -> None:
    arguments = {"quantization": "auto", "device": "auto", "revision": None, "trust_remote_code": False}
    assert chosen(PolicyOptions(), RunOptions()) == {**arguments, "policy": None, "options": LoadOptions()}


@pytest.mark.parametrize("given", ["s3://bucket/model", "model", "/folder/model", "a/b/c", "."])
def test_stream_is_for_hub_ids(given: str) -> None:
    with pytest.raises(PolicyError, match="--stream is for hub ids"):
        SourceOptions(stream=True).address(given)


def test_stream_is_hf_before_a_hub_id() -> None:
    assert SourceOptions(stream=True).address("org/model") == "hf://org/model"
    assert SourceOptions(stream=True).address("hf://org/model") == "hf://org/model"
    assert SourceOptions().address("org/model") == "org/model"


def test_what_is_said_becomes_a_policy_and_options() -> None:
    arguments = chosen(
        PolicyOptions(experts="none", ignore=["a"], override=["b=mxfp8"], no_default_ignore=True, scale_mode="mse"),
        RunOptions(max_memory="1GiB", chunk="1MiB", workers=3, strict=True, kernel=["linear=torch"]),
        digest=True,
    )
    assert arguments["policy"] == QuantizationPolicy("auto", "none", ("a",), (("b", "mxfp8"),), False, "mse")
    assert arguments["options"] == LoadOptions(
        max_memory=1 << 30, chunk_bytes=1 << 20, workers=3, strict=True, kernels={"linear": "torch"}, digest=True
    )


@pytest.mark.parametrize(
    ("given", "limit", "scope"),
    [("1GiB", 1 << 30, "rank"), ("1GiB/rank", 1 << 30, "rank"), ("2MiB/host", 2 << 20, "host")],
)
def test_a_limit_says_what_it_is_of(given: str, limit: int, scope: Any) -> None:
    options = chosen(PolicyOptions(), RunOptions(max_memory=given))["options"]
    assert options == LoadOptions(max_memory=limit, memory_scope=scope)


def test_what_auto_leaves_room_for_is_said_beside_it() -> None:
    options = chosen(PolicyOptions(), RunOptions(), fitting=FitOptions(fit="auto", context=99, requests=2))["options"]
    assert options == LoadOptions(fit="auto", fit_context=99, fit_requests=2)
    assert chosen(PolicyOptions(), RunOptions(), fitting=FitOptions(fit="1GiB"))["options"].fit == 1 << 30
    options = chosen(PolicyOptions(), RunOptions(), fitting=FitOptions(fit="1GiB", fit_head=True))["options"]
    assert options == LoadOptions(fit=1 << 30, fit_head=True)
    for alone in (FitOptions(context=9), FitOptions(fit="1GiB", requests=2)):
        with pytest.raises(PolicyError, match="--context and --requests say what --fit auto leaves room for"):
            chosen(PolicyOptions(), RunOptions(), fitting=alone)


def test_a_limit_of_something_else_is_refused() -> None:
    with pytest.raises(PolicyError, match="--max-memory is '1GiB/gpu'; write a size, a size/rank, or a size/host"):
        chosen(PolicyOptions(), RunOptions(max_memory="1GiB/gpu"))


def test_processes_of_torchrun_divide_the_model_and_one_of_them_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RankOptions().values() == {}
    with pytest.raises(PolicyError, match="start several with torchrun"):
        RankOptions(expert_parallel=True).values()
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert RankOptions(expert_parallel=True).values() == {"tp": "auto", "expert_parallel": True}
    assert LogOptions(verbose=True)._level() == "error"
    assert LogOptions().progress() is False
    monkeypatch.setenv("RANK", "0")
    assert LogOptions(verbose=True)._level() == "debug"


def test_the_help_shows_groups_of_options_under_what_they_are_for() -> None:
    panels = {each.rich_help_panel for each in COMMANDS["load"].params}
    assert {"Which module gets which scheme", "Where the checkpoint comes from", None} <= panels
    assert {each.rich_help_panel for each in COMMANDS["schemes"].params} == {None}
