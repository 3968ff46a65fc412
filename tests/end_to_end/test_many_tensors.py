"""Tens of thousands of small tensors cost little more than their bytes, and come out like a few large ones."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import raw_checkpoint
import torch
from quantized_models import state_bytes
from quantload import LoadOptions, convert_checkpoint, load_quantized, plan_quantized
from quantload.errors import MemoryBudgetError

HIDDEN, INTERMEDIATE = 64, 32
ITEMSIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def config(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 64,
        "hidden_size": HIDDEN, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": layers, "intermediate_size": INTERMEDIATE, "moe_intermediate_size": INTERMEDIATE,
        "num_experts": experts, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Names as they are stored, one tensor an expert and projection."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, HIDDEN), "lm_head.weight": (64, HIDDEN)}
    found["model.norm.weight"] = (HIDDEN,)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{name}_proj.weight": (32, HIDDEN) for name in ("k", "v")}
        found |= {f"{at}.self_attn.q_proj.weight": (64, HIDDEN), f"{at}.self_attn.o_proj.weight": (HIDDEN, 64)}
        found |= {f"{at}.self_attn.{name}_norm.weight": (32,) for name in ("q", "k")}
        found |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        found[f"{at}.mlp.gate.weight"] = (experts, HIDDEN)
        for expert in range(experts):
            name = f"{at}.mlp.experts.{expert}"
            found |= {f"{name}.{side}_proj.weight": (INTERMEDIATE, HIDDEN) for side in ("gate", "up")}
            found[f"{name}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return dict(sorted(found.items()))  # the order in which safetensors stores them


def headers_only(folder: Path, config: dict[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """A checkpoint whose weights are a hole in its file; `tensors` are dtypes and shapes. How many tensors it has."""
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + ITEMSIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw_checkpoint.join_header(folder / raw_checkpoint.SINGLE, header, b"")
    with (folder / raw_checkpoint.SINGLE).open("r+b") as file:
        file.truncate(file.seek(0, 2) + at)
    return len(header)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("layers", "experts", "seconds"),
    [(13, 256, 1.5), pytest.param(130, 256, 5.0, marks=pytest.mark.slow)],
    ids=["10,000 tensors", "100,000 tensors"],
)
def test_index_and_routes_of_many_tensors_take_little_time(
    layers: int, experts: int, seconds: float, tmp_path: Path
) -> None:
    """The goal is 3 s for 100,000; the limit, in processor time, is for slow and busy machines."""
    tensors = {name: ("BF16", shape) for name, shape in shapes(layers, experts).items()}
    count = headers_only(tmp_path, config(layers, experts), tensors)
    assert count >= layers * experts * 3
    plan_quantized(tmp_path)  # imports
    start = time.process_time()
    draft = plan_quantized(tmp_path)
    taken = time.process_time() - start
    assert len(draft.index.tensors) == count
    assert sum(piece.nbytes for piece in draft.plan.pieces) == draft.index.total_bytes
    assert len(draft.plan.pieces) < count / 10
    assert taken < seconds


def in_blocks(layers: int, experts: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same in FP8 with blocks of 128 x 128, scales first, as safetensors stores them."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes(layers, experts).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = "BF16", shape
            continue
        tensors[name] = "F8_E4M3", shape
        tensors[f"{name}_scale_inv"] = "F32", (-(-shape[0] // 128), -(-shape[1] // 128))
    return dict(sorted(tensors.items(), key=lambda item: (-ITEMSIZES[item[1][0]], item[0])))


def fp8_checkpoint(folder: Path, layers: int, experts: int) -> int:
    """Headers of FP8 experts; how many tensors there are."""
    kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(layers))]
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": kept}
    return headers_only(
        folder, {**config(layers, experts), "quantization_config": quantization}, in_blocks(layers, experts)
    )


@pytest.mark.timing
@pytest.mark.parametrize("scheme", ["auto", "quark_mxfp4"])
def test_many_stored_weights_are_few_pieces_and_take_little_time(scheme: str, tmp_path: Path) -> None:
    """The goal is 1 s for 10,000 weights, 20,000 tensors; the limit, in processor time, is for slow machines."""
    layers, experts = 13, 256
    count = fp8_checkpoint(tmp_path, layers, experts)
    assert count >= layers * experts * 6
    plan_quantized(tmp_path, scheme)  # imports
    start = time.process_time()
    draft = plan_quantized(tmp_path, scheme)
    taken = time.process_time() - start
    assert sum(piece.nbytes for piece in draft.plan.pieces) == draft.index.total_bytes
    assert len(draft.plan.pieces) < count / 20
    assert taken < 3.0


def test_a_load_plans_for_tensors_beyond_those_its_allowance_covers(tmp_path: Path) -> None:
    count = fp8_checkpoint(tmp_path, 22, 256)
    assert count > 32768
    assert plan_quantized(tmp_path).plan.memory.slack_bytes == (64 << 20) + (count - 32768) * 1024


@pytest.mark.parametrize(
    ("layers", "chunk", "limit"),
    [(13, 8 << 20, 72 << 20), (26, 4096, 100 << 20)],
    ids=["written tensors", "pieces, too"],
)
def test_a_conversion_refuses_what_its_tensors_and_pieces_have_no_memory_for(
    layers: int, chunk: int, limit: int, tmp_path: Path
) -> None:
    """Every matrix has 4096 bytes and becomes two tensors; without the pieces the second would fit."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("BF16", shape) for name, shape in shapes(layers, 256).items()
    }
    headers_only(tmp_path, config(layers, 256), tensors)
    options = LoadOptions(workers=1, chunk_bytes=chunk, max_memory=limit)
    with pytest.raises(MemoryBudgetError):
        convert_checkpoint(tmp_path, tmp_path / "out", "quark_mxfp4", options=options)


@pytest.mark.slow
def test_a_load_of_very_many_tensors_takes_no_more_than_planned(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path, 60, 256)
    model = load_quantized(tmp_path)
    assert model.load_report.peak_bytes <= model.load_report.predicted_peak_bytes


@pytest.mark.slow
def test_a_conversion_of_very_many_tensors_takes_no_more_than_planned(tmp_path: Path) -> None:
    tensors = {name: ("BF16", shape) for name, shape in shapes(60, 256).items()}
    headers_only(tmp_path, config(60, 256), tensors)
    report = convert_checkpoint(tmp_path, tmp_path / "out", "quark_mxfp4")
    assert report.peak_bytes <= report.predicted_peak_bytes


def fused(tensors: Mapping[str, torch.Tensor], layers: int, experts: int) -> dict[str, torch.Tensor]:
    """The same weights with all experts of a layer in two tensors."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        one = [[tensors[f"{at}.{i}.{side}_proj.weight"] for i in range(experts)] for side in ("gate", "up", "down")]
        gate, up, down = map(torch.stack, one)
        kept |= {f"{at}.gate_up_proj": torch.cat([gate, up], dim=1), f"{at}.down_proj": down}
    return kept


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor", "fp8_per_block", "int8_per_channel", "none"])
def test_one_tensor_an_expert_gives_the_bytes_of_fused_experts(scheme: str, tmp_path: Path) -> None:
    layers, experts = 2, 24
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes(layers, experts).items()}
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in drawn.items()}
    states = []
    for name, stored in (("many", tensors), ("fused", fused(tensors, layers, experts))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config(layers, experts)))
        raw_checkpoint.write_shard(folder / raw_checkpoint.SINGLE, stored)
        states.append(state_bytes(load_quantized(folder, scheme)))
    assert states[0] == states[1]


def test_per_tensor_scales_read_twice_only_what_is_larger_than_a_buffer(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama")
    stored = raw_checkpoint.read(path)
    total = sum(tensor.nbytes for tensor in stored.values())
    assert load_quantized(path, "fp8_per_tensor").load_report.bytes_read == total
    chunk = 5000
    report = load_quantized(path, "fp8_per_tensor", options=LoadOptions(chunk_bytes=chunk)).load_report
    quantized = {f"{layer.name}.weight" for layer in report.layers}
    large = [tensor.nbytes for name, tensor in stored.items() if name in quantized and tensor.nbytes > chunk]
    assert 0 < len(large) < len(quantized)
    assert report.bytes_read == total + sum(large)
