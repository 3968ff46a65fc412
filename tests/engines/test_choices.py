"""Which layers of an engine's model get which scheme, by the engine's names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from quantload.engines.choices import (
    DECODED,
    SCHEMES,
    TOWER,
    LayerChoices,
    are_options,
    is_stored,
    read_options,
    say_decoded,
)
from quantload.errors import PolicyError
from quantload.options import LoadOptions
from quantload.schemes.registry import ENTRIES

QKV = "model.layers.0.self_attn.qkv_proj"


NAME = "quantload_mxfp8"


@pytest.mark.parametrize(
    ("said", "stored", "options"),
    [
        ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, True, False),  # by a tool
        ({"quant_method": "mxfp8", "ignore": ["*.o_proj"], "workers": 2}, True, True),
        ({"quant_method": NAME, "ignore": ["*.o_proj"]}, False, True),
        ({"quant_method": "awq", "bits": 4}, True, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False, False),
        ({}, False, False),
    ],
)
def test_options_are_told_from_what_a_tool_says(said: dict[str, Any], stored: bool, options: bool) -> None:
    assert (is_stored(said, NAME), are_options(said, NAME)) == (stored, options)


@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config", ""])
def test_a_config_says_that_its_checkpoint_is_decoded_wherever_it_said_how_it_is_stored(where: str) -> None:
    tool = {"quant_method": "awq"}
    text = SimpleNamespace(quantization_config=tool)
    config = SimpleNamespace(**{where: text if where == "text_config" else tool} if where else {})
    say_decoded(config, NAME, "awq")
    assert config.quantization_config == {"quant_method": NAME, DECODED: "awq"}
    assert getattr(config, "compression_config", None) is None
    assert text.quantization_config == (config.quantization_config if where == "text_config" else tool)


def choices(merged: Any = None, **fields: Any) -> LayerChoices:
    policy, options = read_options(fields, "int8_per_channel", "quantload_int8_per_channel")
    return LayerChoices(policy, options, merged)


def chosen(choices: LayerChoices, prefix: str) -> str:
    """The scheme's name, or the reason there is none."""
    choice = choices.linear(prefix)
    return choice.reason if choice.scheme is None else choice.scheme.name


def test_every_scheme_has_a_name_and_no_other() -> None:
    assert set(SCHEMES) == {entry.name for entry in ENTRIES} - {"none"}


def test_options_are_those_of_a_policy_and_of_a_load() -> None:
    fields = {"quant_method": "x", "ignore": ["*.k_proj"], "experts": "mxfp8", "chunk_bytes": "1MiB", "hf_config": 1}
    policy, options = read_options(fields, "quark_mxfp4", "x", known=("hf_config",))
    assert (policy.linear, policy.experts, policy.ignore) == ("quark_mxfp4", "mxfp8", ("*.k_proj",))
    assert options == LoadOptions(chunk_bytes=1 << 20)
    with pytest.raises(PolicyError, match="quantization_config has cache; x takes activations"):
        read_options({"cache": "folder"}, "quark_mxfp4", "x")


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, "int8_per_channel"),
        ({"ignore": ["*.qkv_proj"]}, "ignored by pattern '*.qkv_proj'"),
        ({"ignore": ["*.[qkv]_proj"]}, "ignored by pattern '*.[qkv]_proj'"),
        ({"overrides": {"*.self_attn.*": "mxfp8"}}, "mxfp8"),
    ],
)
def test_a_merged_layer_is_named_by_itself_or_by_all_of_its_parts(fields: dict[str, Any], want: str) -> None:
    assert chosen(choices(**fields), QKV) == want


def test_parts_of_a_merged_layer_that_differ_are_an_error() -> None:
    with pytest.raises(PolicyError, match=r"q_proj: ignored by pattern .*k_proj: int8_per_channel"):
        choices(ignore=["*.q_proj"]).linear(QKV)


def test_the_model_knows_better_what_it_merges() -> None:
    model = choices({"qkv_proj": ["c_attn"]}, overrides={"*.c_attn": "mxfp8"})
    assert chosen(model, QKV) == "mxfp8"


def test_what_is_kept_by_default_is_kept() -> None:
    model = choices()
    assert chosen(model, "model.layers.0.mlp.gate") == "router or gate"
    assert chosen(model, "visual.blocks.0.attn.qkv_proj") == TOWER
    assert model.experts("vision_tower.blocks.0.experts").reason == TOWER
    assert chosen(choices(default_ignore=False), "visual.blocks.0.attn.qkv_proj") == "int8_per_channel"
    assert chosen(model, "model.layers.0.self_attn.kv_b_proj") == "int8_per_channel"
    kept = model.linear("model.layers.0.self_attn.kv_b_proj", "computed with")
    assert kept.reason == "computed with"
