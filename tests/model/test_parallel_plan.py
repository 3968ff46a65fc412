"""What each rank has of a model, by transformers' plans for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from quantload.errors import PolicyError, UnsupportedCheckpointError
from quantload.model.parallel_plan import DIVIDED, UNDIVIDED, RankPlan, divide_model, plan_ranks
from quantload.model.routes import CheckpointMap, ModelShapes
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

# Those that change more than a rank's own tensors and forward; no model's own plan has them.
NOT_OURS = {"sequence_parallel", "megamoe_router", "megamoe_experts"}


def on_meta(name: str, **config: Any) -> PreTrainedModel:
    architecture = BY_NAME[name]
    values = architecture.config()
    for key, value in config.items():
        setattr(values, key, value)
    with torch.device("meta"):
        return architecture.model_class(values)


def plans(model: PreTrainedModel, ranks: int, expert_parallel: bool = False) -> list[RankPlan]:
    return [plan_ranks(model, rank, ranks, expert_parallel) for rank in range(ranks)]


def intervals(plans: list[RankPlan], name: str) -> list[Any]:
    return [plan.shares[name].intervals for plan in plans]


def divided(model: PreTrainedModel, plan: RankPlan) -> Mapping[str, torch.Tensor]:
    mapped = CheckpointMap(ModelShapes(model), [], {}, [], [], set(), [])
    divide_model(model, mapped, plan)
    return mapped.shapes.tensors


def test_every_style_of_transformers_is_known() -> None:
    assert {*ALL_PARALLEL_STYLES} - NOT_OURS <= DIVIDED.keys() | UNDIVIDED


def test_layers_are_divided_by_rows_and_then_by_columns() -> None:
    of_ranks = plans(on_meta("llama"), 2)
    layer = "model.layers.1"
    assert intervals(of_ranks, f"{layer}.self_attn.q_proj.weight") == [((0, 32),), ((32, 64),)]
    assert intervals(of_ranks, f"{layer}.mlp.down_proj.weight") == [((0, 48),), ((48, 96),)]
    assert of_ranks[0].shares[f"{layer}.mlp.down_proj.weight"].dim == 1
    assert f"{layer}.input_layernorm.weight" not in of_ranks[0].shares
    assert of_ranks[0].styles[f"{layer}.mlp.down_proj"] == "rowwise"


def test_gate_and_up_are_divided_each_for_itself() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert intervals(plans(on_meta("qwen3_moe"), 2), name) == [((0, 16), (32, 48)), ((16, 32), (48, 64))]


def test_a_rank_has_whole_experts_where_that_is_asked_for() -> None:
    of_ranks = plans(on_meta("qwen3_moe"), 4, expert_parallel=True)
    experts = "model.layers.0.mlp.experts"
    assert intervals(of_ranks, f"{experts}.down_proj") == [((rank, rank + 1),) for rank in range(4)]
    assert [plan.first_experts[experts] for plan in of_ranks] == [0, 1, 2, 3]
    assert "model.layers.0.self_attn.q_proj.weight" in of_ranks[0].shares


def test_experts_that_no_plan_divides_are_dealt_out_with_their_biases() -> None:
    (_, plan) = plans(on_meta("gpt_oss"), 2)
    experts = {name.rpartition(".")[2] for name in plan.shares if ".experts." in name}
    assert experts == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}


def test_key_and_value_heads_fewer_than_ranks_are_had_by_several() -> None:
    model = on_meta("llama")  # 4 heads, 2 of keys and values, 16 wide
    of_ranks = plans(model, 4)
    attention = "model.layers.0.self_attn"
    assert intervals(of_ranks, f"{attention}.k_proj.weight") == [((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)]
    assert of_ranks[0].heads_per_kv[attention] == 1
    tensors = divided(model, of_ranks[3])
    assert tensors[f"{attention}.v_proj.weight"].shape == (16, 64)
    assert model.get_submodule(attention).num_key_value_groups == 1


def test_tied_parameters_are_divided_alike_or_not_at_all() -> None:
    plan = plans(on_meta("llama_tied"), 2)[0]
    embedding, head = (plan.shares.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert embedding == head
    assert ("lm_head" in plan.styles) == (head is not None)


def test_heads_of_a_size_that_ranks_cannot_divide_are_had_by_all() -> None:
    model = on_meta("llama", vocab_size=161)
    plan = plans(model, 2)[0]
    assert "lm_head.weight" not in plan.shares
    assert "lm_head" not in plan.styles


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("llama", 3, "64 rows, which 3 ranks cannot divide"),
        ("llama", 8, "4 attention heads, which 8 ranks cannot divide"),
        ("gpt_oss", 3, "4 experts, which 3 ranks cannot divide"),
        ("gpt2", 2, "has no plan of tensor or expert parallelism"),
    ],
)
def test_what_ranks_cannot_hold_together_is_refused(name: str, ranks: int, expected: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=expected):
        plan_ranks(on_meta(name), 0, ranks)


def test_expert_parallelism_of_a_model_without_experts_is_refused() -> None:
    with pytest.raises(PolicyError, match="no plan of it for the experts of LlamaForCausalLM"):
        plan_ranks(on_meta("llama"), 0, 2, expert_parallel=True)


def test_a_style_that_is_not_known_is_refused() -> None:
    model = on_meta("llama")
    model._tp_plan = {"model.layers.*.input_layernorm": "sequence_parallel", **model._tp_plan}
    with pytest.raises(UnsupportedCheckpointError, match="the style 'sequence_parallel' for model"):
        plan_ranks(model, 0, 2)


def test_only_what_is_divided_changes_on_the_way() -> None:
    model = on_meta("qwen3_moe")
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    plan = plan_ranks(model, 1, 2)
    after = {name: tensor.shape for name, tensor in divided(model, plan).items()}
    assert {name for name in before if before[name] != after[name]} == plan.shares.keys()
    assert all(after[name][share.dim] == share.length for name, share in plan.shares.items())
