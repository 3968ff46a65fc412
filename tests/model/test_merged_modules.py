"""Which layers share one tensor scale."""

from __future__ import annotations

from quantload.model.merged_modules import merged_modules


def test_siblings_that_are_all_there_are_merged() -> None:
    names = [f"layers.{n}.self_attn.{name}_proj" for n in range(2) for name in "qkvo"]
    names += ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]
    assert merged_modules(names) == [
        ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"],
        ["layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"],
        ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"],
    ]


def test_one_that_is_missing_leaves_the_others_alone() -> None:
    assert merged_modules(["a.q_proj", "a.k_proj", "b.v_proj", "a.gate_proj"]) == []


def test_modules_without_a_parent_are_siblings_too() -> None:
    assert merged_modules(["w1", "w2", "w3"]) == [["w1", "w3"]]
