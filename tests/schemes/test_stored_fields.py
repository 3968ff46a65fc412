"""A field of a quantization config that nobody knows is an error; those of real exports are known."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload.errors import CheckpointError
from quantload.schemes.stored.fields import CONFIG
from quantload.schemes.stored.read import READERS, read_stored

STORED = Path(__file__).parent.parent / "data" / "stored"
GOLDEN = {path.parent.name: json.loads(path.read_text()) for path in sorted(STORED.glob("*/config.json"))}
SPEC = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
MADE: dict[str, dict[str, Any]] = {
    "awq of AutoAWQ": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "do_fuse": False,
        "modules_to_not_convert": None, "fuse_max_seq_len": None, "exllama_config": None, "backend": "autoawq",
    },
    "gptq of transformers": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "true_sequential": True,
        "damp_percent": 0.1, "dataset": "c4", "tokenizer": None, "use_exllama": True, "exllama_config": {"version": 2},
        "cache_block_outputs": True, "batch_size": 1, "pad_token_id": None, "model_seqlen": 4096, "backend": None,
    },
    "gptq of GPTQModel": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
        "dynamic": {"-:.*gate.*": {}, "+:.*down.*": {"bits": 8, "group_size": 64, "sym": True}}, "pack_dtype": "int32",
        "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "mse": 0.0},
    },
    "gptq of AutoRound": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "data_type": "int",
        "iters": 200, "lr": 0.005, "nsamples": 128, "seqlen": 2048, "autoround_version": "0.4", "damp_percent": 0.01,
        "enable_quanted_input": True, "low_gpu_mem_usage": True, "true_sequential": False, "provider": "auto-round",
    },
    "fp8 of DeepSeek": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
    },
    "fp8 of transformers": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "dequantize": False,
        "modules_to_not_convert": ["lm_head"], "scale_fmt": "float", "expert_dtype": "fp8",
    },
    "modelopt beside the config": {
        "quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    },
    "modelopt mixed": {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "producer": {"name": "modelopt"},
        "quantized_layers": {"model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16}},
    },
    "quark of 0.13": {
        "quant_method": "quark", "global_quant_config": {"weight": SPEC, "bias": None, "output_tensors": None},
        "layer_type_quant_config": {}, "layer_quant_config": {"*down*": {"weight": SPEC, "input_tensors": SPEC}},
        "algo_config": [{"name": "gptq"}], "softmax_quant_spec": None, "version": "0.13", "quant_mode": "eager_mode",
        "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": ["*k_proj"]},
    },
    "mxfp4 of transformers": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"], "dequantize": False},
}  # fmt: skip
FREE = (
    *("meta", "exllama_config", "algo_config", "producer", "formats", "shapes", "observer_kwargs"),
    *("kv_cache_scheme", "kv_cache_quant_config", "softmax_quant_spec", "output_tensors", "output_activations"),
)
"""Objects in which a tool writes what it likes, or that are about what is not rounded here."""
NAMES = ("config_groups", "layer_quant_config", "layer_type_quant_config", "dynamic", "quantized_layers")
"""Objects whose fields are names of modules or of groups."""


def configs() -> dict[str, dict[str, Any]]:
    return {name: config.get("quantization_config", config) for name, config in GOLDEN.items()} | MADE


def read(config: dict[str, Any]) -> None:
    """Reads a config beside no tensors, which says all there is to say about its fields."""
    read_stored({"quantization_config": config}, {}, lambda entry: torch.zeros(1))


def places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where an object stands that is read field by field."""
    if path and path[-1] in FREE:
        return
    if isinstance(config, list):
        for number, item in enumerate(config):
            yield from places(item, (*path, number))
    if not isinstance(config, dict):
        return
    named = bool(path) and path[-1] in NAMES
    if not named and not (len(path) > 1 and path[-2] == "dynamic" and str(path[-1]).startswith("-:")):
        yield path
    for name, value in config.items():
        yield from places(value, (*path, name))


@pytest.mark.parametrize("name", configs())
def test_the_fields_of_real_exports_are_known(name: str) -> None:
    read(configs()[name])


@pytest.mark.parametrize("name", configs())
def test_a_field_that_nobody_knows_is_an_error_wherever_it_stands(name: str) -> None:
    found = list(places(configs()[name]))
    assert () in found
    for path in found:
        for value, known in (("x", False), (1, False), (False, False), (None, True), ([], True), ({}, True)):
            config = copy.deepcopy(configs()[name])
            place: Any = config
            for part in path:
                place = place[part]
            place["rotated"] = value
            if known:
                read(config)
                continue
            with pytest.raises(CheckpointError, match=r"rotated is .*a field that is not known"):
                read(config)


def test_every_method_that_is_read_has_its_fields() -> None:
    assert CONFIG.keys() == READERS.keys()
    assert all("quant_method" in fields for fields in CONFIG.values())
