"""What quantload takes from transformers' private side is there, and does what transformers does with it.

Run with the oldest and the newest transformers the package allows.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BY_NAME, reference
from quantload.errors import CheckpointError, UnsupportedCheckpointError
from quantload.model import transformers_api
from safetensors.torch import load_file
from transformers import PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils
from transformers.integrations import moe

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (conversion_mapping.get_model_conversion_mapping, ["model"]),
        (core_model_loading.rename_source_key,
         ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]),
        (core_model_loading.dot_natural_key, ["s"]),
        (modeling_utils.LoadStateDictConfig, ["pretrained_model_name_or_path", "device_map"]),
        (modeling_utils.LoadStateDictInfo,
         ["missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors", "error_msgs"]),
        (PreTrainedModel.get_init_context, ["dtype", "is_quantized", "_is_ds_init_called"]),
        (PreTrainedModel._get_dtype_plan, ["self", "dtype"]),
        (PreTrainedModel._adjust_missing_and_unexpected_keys, ["self", "loading_info"]),
        (PreTrainedModel._finalize_model_loading, ["model", "load_config", "loading_info"]),
        (moe.ALL_EXPERTS_FUNCTIONS.register, ["key", "value"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_names_and_signatures(function: Any, names: list[str]) -> None:
    parameters = list(inspect.signature(function).parameters)
    assert [name for name in names if name not in parameters] == []


def test_conversions_take_what_they_are_given() -> None:
    taken = inspect.signature(core_model_loading.ConversionOps.convert).parameters
    assert list(taken)[:4] == ["self", "input_dict", "source_patterns", "target_patterns"]
    entry = core_model_loading.WeightConverter("a", "b", operations=[core_model_loading.Chunk()])
    assert (entry.source_patterns, entry.target_patterns) == (["a"], ["b"])
    assert entry.was_used() in (True, False)


def on_meta(path: Path) -> tuple[PreTrainedModel, torch.dtype]:
    config = transformers_api.load_config(path, trust_remote_code=False)
    cls = transformers_api.model_class(config, path, trust_remote_code=False)
    dtype = transformers_api.settle_dtype(config, [torch.bfloat16])
    return transformers_api.meta_model(cls, config, path, dtype), dtype


@pytest.mark.parametrize(
    "name",
    ["llama_tied", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "phi3", "gemma3", "gpt2", "bert", "t5",
     "qwen3_vl_moe", "jamba", "olmoe"],
)  # fmt: skip
def test_names_and_conversions_give_the_parameters_that_transformers_loads(name: str, checkpoint: Checkpoint) -> None:
    """`plan_names` and `convert` on the tensors themselves, against `from_pretrained`."""
    path = checkpoint(name)
    tensors: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
    model, _ = on_meta(path)
    plan = transformers_api.plan_names(model, tensors)
    got: dict[str, torch.Tensor] = {}
    for conversion in plan.conversions:
        got |= transformers_api.convert(model, conversion, tensors)
    assert plan.unexpected == []
    want = reference(path, BY_NAME[name])
    want_state = want.state_dict()
    assert set(want_state) - set(got) == set(want_state) & transformers_api.tied_names(model) - set(got)
    for parameter, value in got.items():
        assert torch.equal(value.to(want_state[parameter].dtype), want_state[parameter]), parameter


def test_the_order_of_the_names_does_not_matter(checkpoint: Checkpoint) -> None:
    model, _ = on_meta(checkpoint("qwen3_moe"))
    tensors = load_file(checkpoint("qwen3_moe") / "model.safetensors")
    plans = [transformers_api.plan_names(model, names) for names in (sorted(tensors), sorted(tensors, reverse=True))]
    first, second = ([(c.target, c.sources) for c in plan.conversions] for plan in plans)
    assert first == second
    experts = next(c for c in plans[0].conversions if c.target == "model.layers.0.mlp.experts.gate_up_proj")
    for names in experts.sources.values():
        assert [int(name.split(".experts.")[1].split(".")[0]) for name in names] == [0, 1, 2, 3]


def test_names_that_nothing_takes(checkpoint: Checkpoint) -> None:
    model, _ = on_meta(checkpoint("llama"))
    plan = transformers_api.plan_names(model, ["model.norm.weight", "model.norm.weight_scale", "other"])
    assert [conversion.target for conversion in plan.conversions] == ["model.norm.weight"]
    assert sorted(plan.unexpected) == ["model.norm.weight_scale", "other"]


@pytest.mark.parametrize(
    ("named", "stored", "settled"),
    [
        (torch.float16, [torch.bfloat16], torch.float16),
        ("bfloat16", [torch.float32], torch.bfloat16),
        ("torch.float16", [], torch.float16),
        (None, [torch.int64, torch.bfloat16, torch.float32], torch.bfloat16),
        (None, [torch.float8_e4m3fn, torch.float16], torch.float16),
        (None, [torch.int64], torch.float32),
        (None, [], torch.float32),
    ],
)
def test_the_dtype_of_what_is_not_quantized(named: Any, stored: list[torch.dtype], settled: torch.dtype) -> None:
    config = transformers.Gemma3Config()
    config.dtype = named
    assert transformers_api.settle_dtype(config, stored) == settled
    assert (config.dtype, config.text_config.dtype, config.vision_config.dtype) == (settled,) * 3


def test_parts_that_stay_in_float32(checkpoint: Checkpoint) -> None:
    """T5 keeps its `wo` layers in float32 when it is loaded in float16."""
    model, _ = on_meta(checkpoint("t5_float16"))
    plan = transformers_api.DtypePlan(model, torch.float16)
    want = reference(checkpoint("t5_float16"), BY_NAME["t5_float16"]).state_dict()
    assert {name: plan(name, torch.float16) for name in want} == {name: value.dtype for name, value in want.items()}


def test_missing_and_unexpected_after_the_exceptions_of_the_class(checkpoint: Checkpoint) -> None:
    model, _ = on_meta(checkpoint("llama_tied"))
    missing, unexpected = transformers_api.complaints(
        model, {"lm_head.weight", "model.norm.weight"}, ["model.layers.0.self_attn.rotary_emb.inv_freq", "other"]
    )
    assert missing == {"model.norm.weight"}
    assert unexpected == {"other"}


def test_tied_parameters_and_the_output_head(checkpoint: Checkpoint) -> None:
    tied, _ = on_meta(checkpoint("llama_tied"))
    assert transformers_api.tied_names(tied) == {"lm_head.weight"}
    assert transformers_api.tied_parameters(tied) == {"lm_head.weight", "model.embed_tokens.weight"}
    plain, _ = on_meta(checkpoint("llama"))
    assert transformers_api.tied_parameters(plain) == set()
    assert transformers_api.output_heads(plain) == {id(plain.lm_head)}
    assert transformers_api.output_heads(plain.model) == set()
    assert transformers_api.output_heads(torch.nn.Linear(1, 1)) == set()


def test_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]}))
    with pytest.raises(
        CheckpointError, match=r"/config\.json: transformers .*llama9.*; the weights have not .*update transformers if"
    ):
        transformers_api.load_config(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
def test_a_config_that_names_no_class(architectures: Any, tmp_path: Path) -> None:
    config = types.SimpleNamespace(architectures=architectures)  # transformers' own may refuse some of these itself
    said = rf"/config\.json: `architectures` is {re.escape(repr(architectures))}; expected a list"
    with pytest.raises(CheckpointError, match=said):
        transformers_api.model_class(config, tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("name", ["LlamaForEverything", "LlamaConfig", "load", "AutoModel"])
def test_a_class_that_transformers_does_not_have(name: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(architectures=[name])
    with pytest.raises(UnsupportedCheckpointError, match=f"/config.json: architecture '{name}' .* update transformers"):
        transformers_api.model_class(config, tmp_path, trust_remote_code=False)
    config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    with pytest.raises(UnsupportedCheckpointError, match="trust_remote_code=True"):
        transformers_api.model_class(config, tmp_path, trust_remote_code=False)


def test_generation_config_from_the_folder_or_from_the_model_config(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, _ = on_meta(checkpoint("llama"))
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    transformers_api.adopt_generation_config(model, tmp_path)
    assert model.generation_config.eos_token_id == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "max_new_tokens": 3}')
    transformers_api.adopt_generation_config(model, tmp_path)
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (7, 3)
