"""Routers and heads of any name stay as they are in a load, and linear layers of any class are quantized rightly."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import Architecture, Inputs, inputs_for, logits, quantizable_modules, reference, save
from quantized_models import assert_logits_match, quantized_modules
from quantload import QuantizationPolicy, load_quantized
from transformers import PreTrainedConfig

VOCAB = 160
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def falcon(**values: Any) -> PreTrainedConfig:
    sizes = {key: DECODER[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.FalconConfig(
        **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, **values
    )


def dia() -> PreTrainedConfig:
    sizes = {key: DECODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    cross = {"cross_num_attention_heads": 4, "cross_head_dim": 16, "cross_num_key_value_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    return transformers.DiaConfig(
        encoder_config={**sizes, **heads, "vocab_size": VOCAB},
        # As wide as a layer between, and with as many codes as its hidden states have numbers.
        decoder_config={**sizes, **heads, **cross, **ids, "cross_hidden_size": 64, "vocab_size": 64, "num_channels": 3},
        delay_pattern=[0, 1, 2],
    )


def codes(rows: int, *more: int) -> torch.Tensor:
    return torch.randint(3, 60, (rows, *more), generator=torch.Generator().manual_seed(4))


def dia_inputs() -> Inputs:
    return {"input_ids": inputs_for("llama")["input_ids"], "decoder_input_ids": codes(2, 7, 3)}


MODELS = (
    Architecture("falcon", "FalconForCausalLM", lambda: falcon(bias=True), lambda: inputs_for("llama"), kept="lm_head"),
    Architecture(
        "falcon_new",
        "FalconForCausalLM",
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        lambda: inputs_for("llama"),
        kept="lm_head",
    ),
    Architecture(
        "hunyuan_moe",
        "HunYuanMoEV1ForCausalLM",
        lambda: transformers.HunYuanMoEV1Config(**DECODER, head_dim=16, num_experts=4, moe_topk=2),
        lambda: inputs_for("llama"),
        kept=r"mlp\.gate\.wg|lm_head",
    ),
    Architecture(
        "doge_moe",
        "DogeForCausalLM",
        lambda: transformers.DogeConfig(**DECODER, is_moe=True, num_experts=64, num_experts_per_tok=4),
        lambda: inputs_for("llama"),
        kept=r"router_gate|lm_head|dt_proj",
    ),
    Architecture(
        "musicgen",
        "MusicgenForCausalLM",
        lambda: transformers.MusicgenDecoderConfig(
            vocab_size=64, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, num_codebooks=3,
            max_position_embeddings=64, pad_token_id=64, bos_token_id=64,
        ),
        lambda: {"input_ids": codes(6, 9)},
        kept=r"lm_heads\.",
    ),
    Architecture("dia", "DiaForConditionalGeneration", dia, dia_inputs, kept="logits_dense"),
    Architecture(
        "roberta",
        "RobertaForSequenceClassification",
        lambda: transformers.RobertaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_labels=7,
        ),
        lambda: inputs_for("llama"),
        kept=r"classifier\.out_proj",
    ),
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_all_but_routers_and_heads_is_quantized_and_right(model: Architecture, tmp_path: Path) -> None:
    path = save(replace(model, dtype=torch.float32), tmp_path / "model")
    loaded = load_quantized(path, "int8_per_channel")
    names = {name for name, _ in quantizable_modules(reference(path, model))}
    kept = {name for name in names if model.kept and re.search(model.kept, name)}
    assert kept
    assert set(quantized_modules(loaded)) == names - kept
    assert kept == {each["name"] for each in loaded.load_report.to_dict()["kept"]} & names
    if model.name == "doge_moe" and transformers.__version__ == "5.16.0":
        with pytest.raises(TypeError, match="must be Tensor, not tuple"):  # its own experts return a pair there
            logits(reference(path, model), model.inputs())
        return
    assert_logits_match(loaded, path, replace(model, dtype=torch.float32))


def test_an_override_quantizes_a_head_of_any_name(tmp_path: Path) -> None:
    path = save(next(model for model in MODELS if model.name == "musicgen"), tmp_path / "model")
    policy = QuantizationPolicy(linear="int8_per_channel", overrides=(("lm_heads.1", "fp8_per_channel"),))
    found = {
        name: module.scheme.name for name, module in quantized_modules(load_quantized(path, policy=policy)).items()
    }
    assert found["lm_heads.1"] == "fp8_per_channel"
    assert not {"lm_heads.0", "lm_heads.2"} & found.keys()
    everything = load_quantized(path, "int8_per_channel", policy=QuantizationPolicy(default_ignore=False))
    assert {"lm_heads.0", "lm_heads.1", "lm_heads.2"} <= set(quantized_modules(everything))


# A model that brings its own linear layers, as remote code does

MODELING = '''
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ColumnParallel(nn.Linear):
    """A product, written out."""

    def __init__(self, *sizes, bias=True, gather_output=True):
        super().__init__(*sizes, bias=bias)
        self.gather_output = gather_output

    def forward(self, x):
        out = torch.matmul(x, self.weight.t())
        return out if self.bias is None else out + self.bias


class Halved(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


class Lora(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lora_a, self.lora_b = nn.Linear(sizes[0], 8, bias=False), nn.Linear(8, sizes[1], bias=False)

    def forward(self, x):
        return super().forward(x) + self.lora_b(self.lora_a(x))


class Config(PretrainedConfig):
    model_type = "own_linears"

    def __init__(self, vocab_size=160, hidden_size=64, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.product, self.plain = ColumnParallel(size, 96), nn.Linear(96, size)
        self.unbiased = ColumnParallel(size, size, bias=False)
        self.halved, self.clipped, self.lora = Halved(size, size), Clipped(size, size), Lora(size, size)

    def forward(self, x):
        x = x + self.plain(F.silu(self.product(x)))
        return x + self.unbiased(self.halved(x)) + self.lora(self.clipped(x))


class Own(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(2))
        self.to_words = ColumnParallel(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.to_words(x))
'''


def test_linear_layers_that_a_model_brings_along(tmp_path: Path) -> None:
    """Products are quantized and right; the others are kept, each with its reason."""
    (tmp_path / "modeling.py").write_text(MODELING)
    spec = importlib.util.spec_from_file_location("own_linears", tmp_path / "modeling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    original = module.Own(module.Config())
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Own"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))

    loaded = load_quantized(tmp_path, "int8_per_channel", trust_remote_code=True)
    reasons = {each["name"]: each["reason"] for each in loaded.load_report.to_dict()["kept"]}
    assert set(quantized_modules(loaded)) == {
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in ("product", "plain", "unbiased", "lora.lora_a", "lora.lora_b")
    }
    assert reasons["layers.0.halved"] == "Halved is a linear layer with code of its own"
    assert reasons["layers.1.clipped"] == "Clipped is a linear layer with code of its own"
    assert "more than a weight and a bias: lora_a, lora_b" in reasons["layers.0.lora"]
    assert reasons["to_words"] == "output head"
    inputs = inputs_for("llama")
    with torch.no_grad():
        for name, quantized in quantized_modules(loaded).items():
            original.get_submodule(name).weight.copy_(quantized.dequantize("weight"))
        torch.testing.assert_close(loaded(**inputs).logits, original(**inputs).logits, rtol=1e-4, atol=1e-4)
