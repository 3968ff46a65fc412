"""Routers and output heads are found by what they are; a name or a width alone makes none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from model_classes import on_meta, shallow, without_numbers
from quantload.model.roles import FEW_OUTPUTS, roles
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

ROUTER, HEAD = "router or gate", "output head"


def found(model: PreTrainedModel) -> dict[str, str]:
    return {without_numbers(name): reason for name, reason in roles(model).items()}


def model(class_name: str, **values: Any) -> PreTrainedModel:
    """A model on meta; `values` change its config, `part__key` the part of it."""
    cls = getattr(transformers, class_name)
    config = shallow(cls)
    for key, value in values.items():
        *parts, last = key.split("__")
        target: Any = config
        for part in parts:
            target = getattr(target, part)
        setattr(target, last, value)
    return on_meta(cls, config)


EXPECTED: dict[str, dict[str, str]] = {
    "LlamaForCausalLM": {"lm_head": HEAD},
    # Routers under other names, within modules that are the routers.
    "HunYuanMoEV1ForCausalLM": {"model.layers.*.mlp.gate.wg": ROUTER, "lm_head": HEAD},
    "DogeModel": {"layers.*.mlp.router_gate": ROUTER},
    "ZayaModel": {f"layers.*.mlp.gate.router_mlp.{name}": ROUTER for name in ("fc1", "fc2", "out_proj")},
    "JetMoeModel": {"layers.*.mlp.router.layer": ROUTER, "layers.*.self_attention.experts.router.layer": ROUTER},
    "Qwen2MoeModel": {"layers.*.mlp.shared_expert_gate": ROUTER},
    # One head for each codebook, one for all of them, one for codes, one of a part.
    "MusicgenForCausalLM": {"lm_heads.*": HEAD},
    "DiaForConditionalGeneration": {"logits_dense": HEAD},
    "HiggsAudioV2ForConditionalGeneration": {"audio_lm_head": HEAD},
    "Qwen2_5OmniTalkerForConditionalGeneration": {"codec_head": HEAD},
    "Llama4ForConditionalGeneration": {
        "language_model.lm_head": HEAD,
        "language_model.model.layers.*.feed_forward.router": ROUTER,
    },
    "JanusModel": {"generation_head.vision_head": HEAD},
    # CTC and transducers (whose head tells durations apart too); a head for less than the vocabulary.
    "OmniASRForCTC": {"ctc_head": HEAD},
    "ParakeetForTDT": {"joint.head": HEAD},
    "Ovis2Model": {"vision_tower.head_linear": HEAD},
    # Three heads on one encoder, none of them declared; a pooler and what stands before a head are layers.
    "MgpstrForSceneTextRecognition": {"char_head": HEAD, "bpe_head": HEAD, "wp_head": HEAD},
    "BertForPreTraining": {"cls.predictions.decoder": HEAD, "cls.seq_relationship": "only 2 outputs"},
    "LlamaForSequenceClassification": {"score": HEAD},
    # Projections of attention, called heads.
    "FunnelModel": {},
}


@pytest.mark.parametrize("class_name", EXPECTED)
def test_what_is_kept(class_name: str) -> None:
    if not hasattr(transformers, class_name):
        pytest.skip(f"this transformers has no {class_name}")
    assert found(model(class_name)) == EXPECTED[class_name]


def test_a_gate_of_something_else_than_experts_is_a_layer() -> None:
    assert not any("gateway.gate" in name for name in found(model("DFineModel")))


@pytest.mark.parametrize("labels", [2, 3, 7, 600])
def test_the_last_layer_of_a_classification_head_is_kept_whatever_it_is_called(labels: int) -> None:
    reasons = found(model("RobertaForSequenceClassification", num_labels=labels))
    few = f"only {labels} outputs" if labels <= FEW_OUTPUTS else HEAD
    assert reasons == {"classifier.out_proj": few}


def test_layers_as_wide_as_vocabulary_experts_and_labels_are_layers() -> None:
    """All of these are 64, as are the heads of attention together, and half of what a part of the experts has."""
    same = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    size = {"vocab_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    deepseek = model("DeepseekV3ForCausalLM", **same, **size, n_routed_experts=64, num_labels=64, q_lora_rank=64)
    assert found(deepseek) == {"lm_head": HEAD}
    hunyuan = model("HunYuanMoEV1ForCausalLM", **same, **{**size, "num_experts": 64})
    assert found(hunyuan) == {"model.layers.*.mlp.gate.wg": ROUTER, "lm_head": HEAD}
    bert = model("BertForMaskedLM", hidden_size=64, num_attention_heads=4, vocab_size=64, intermediate_size=64)
    assert found(bert) == {"cls.predictions.decoder": HEAD}
    dia = {f"decoder_config__{key}": 64 for key in ("vocab_size", "hidden_size", "intermediate_size")}
    assert found(model("DiaForConditionalGeneration", **dia)) == {"logits_dense": HEAD}


# Models written for this test


class Config(PretrainedConfig):  # type: ignore[misc]
    model_type = "written_for_a_test_of_roles"

    def __init__(self, vocab_size: int = 96, num_experts: int = 6, **kwargs: Any) -> None:
        self.vocab_size, self.num_experts, self.hidden_size = vocab_size, num_experts, 32
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.chooses = nn.Linear(32, config.num_experts)
        self.as_wide = nn.Linear(32, 6)
        self.gate = nn.Linear(32, 32)
        self.score = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))


class Own(PreTrainedModel):  # type: ignore[misc]
    """With heads for the tokens after the next one, as Medusa and multi-token prediction have them."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(2))
        self.tokens_ahead = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, config.vocab_size)) for _ in range(3)
        )
        self.wide = nn.Linear(32, 96)
        self.out = nn.Linear(32, config.vocab_size)
        self.reward = nn.Linear(32, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass


class Stubborn(Own):
    """Which takes one config only."""

    def __init__(self, config: Config) -> None:
        if (config.vocab_size, config.num_experts) != (96, 6):
            raise ValueError("96 and 6")
        super().__init__(config)


class Several(Own):
    def get_output_embeddings(self) -> Any:
        return [self.out, {}, self.wide]


def test_layers_that_follow_the_config_are_heads_and_routers() -> None:
    with torch.device("meta"):
        reasons = found(Own(Config(dtype=torch.float32)))
    assert reasons == {
        "layers.*.chooses": ROUTER,
        "layers.*.gate": ROUTER,  # next to experts
        "tokens_ahead.*.*": HEAD,
        "out": HEAD,
        "reward": "only 1 output",
    }


def test_the_width_decides_where_a_class_cannot_be_asked() -> None:
    with torch.device("meta"):
        stubborn = Stubborn(Config(dtype=torch.float32))
    reasons = found(stubborn)
    assert reasons == {
        "layers.*.chooses": ROUTER,
        "layers.*.as_wide": ROUTER,
        "layers.*.gate": ROUTER,
        "wide": HEAD,
        "out": HEAD,
        "tokens_ahead.*.*": HEAD,
        "reward": "only 1 output",
    }


def test_a_list_of_heads_is_taken_at_its_word() -> None:
    with torch.device("meta"):
        reasons = found(Several(Config(dtype=torch.float32)))
    assert reasons["wide"] == reasons["out"] == HEAD
