"""Codes that transformers' own operation of a conversion decodes: whole, counted, and as transformers decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import VOCAB
from quantload import load_quantized, plan_quantized
from quantload.errors import MissingWeightsError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "Inkling2LoopForCausalLM"), reason="this transformers has no Inkling2Loop"
)

LAYERS = 6
EXPERTS = ("w13_weight", "w2_weight")


def nvfp4(weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes in the place of `weight`, two to a byte, with a scale for 16 values and a factor per expert."""
    experts, rows, columns = weight.shape
    codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator)
    return {
        "": codes.to(torch.uint8),
        "_scale": (torch.rand(experts, rows, columns // 16, generator=generator) + 0.5).to(torch.float8_e4m3fn),
        "_amax": torch.rand(experts, generator=generator) + 0.5,
        "_outer_scale_denominator": torch.tensor([6 * 448.0]),
    }


def mxfp8(weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes in the place of `weight`, with a power of two for 32 values."""
    experts, rows, columns = weight.shape
    scales = torch.randint(115, 125, (experts, rows, columns // 32), generator=generator)
    return {
        "": torch.randn(weight.shape, generator=generator).to(torch.float8_e4m3fn),
        "_scale": scales.to(torch.uint8),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Inkling2Loop checkpoint in BF16."""
    config = transformers.Inkling2LoopTextConfig(
        vocab_size=VOCAB, unpadded_vocab_size=VOCAB - 6, hidden_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, swa_num_attention_heads=4,
        swa_num_key_value_heads=2, swa_head_dim=16, sliding_window_size=8, d_rel=4, rel_extent=16,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_layers_per_attn_res_block=2,
        loop_layer_index_start=2, loop_layer_index_end=4, loop_num_passes=2, loop_gate_rank=8, eos_token_id=1,
        layer_types=["hybrid_sliding", "hybrid"] * (LAYERS // 2),
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    transformers.Inkling2LoopForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def with_tensors(source: Path, folder: Path, change: dict[str, Tensor], without: tuple[str, ...] = ()) -> Path:
    """A copy of a checkpoint of one shard with other and fewer tensors."""
    for file in source.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    tensors = load_file(source / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(without)} if without else tensors
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def coded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts in codes: MXFP8 in the last layer, NVFP4 in the others, as Inkling2Loop is published."""
    generator = torch.Generator().manual_seed(0)
    codes: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(EXPERTS):
            encode: Any = mxfp8 if f".{LAYERS - 1}." in name else nvfp4
            codes |= {name + suffix: made for suffix, made in encode(tensor, generator).items()}
    return with_tensors(plain, tmp_path_factory.mktemp("coded"), codes)


@pytest.fixture(scope="module")
def decoded(coded: Path) -> PreTrainedModel:
    """What transformers makes of the codes."""
    model: PreTrainedModel = transformers.Inkling2LoopForCausalLM.from_pretrained(coded, dtype="auto")
    return model


def test_experts_without_codes_need_no_fallback(plain: Path) -> None:
    want = transformers.Inkling2LoopForCausalLM.from_pretrained(plain, dtype="auto").state_dict()
    got = load_quantized(plain, "none")
    assert got.load_report.fallback_conversions == 0
    assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in want.items())


def test_decoded_experts_are_those_of_transformers(coded: Path, decoded: PreTrainedModel) -> None:
    got = load_quantized(coded, "none")
    assert got.load_report.fallback_conversions == plan_quantized(coded, "none").plan.whole_conversions == 2 * LAYERS
    for name, tensor in decoded.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


def test_decoded_experts_are_quantized_as_those_of_a_checkpoint_of_values(
    coded: Path, decoded: PreTrainedModel, tmp_path: Path
) -> None:
    decoded.save_pretrained(tmp_path)
    want, got = load_quantized(tmp_path, "quark_mxfp4"), load_quantized(coded, "quark_mxfp4")
    assert (want.load_report.fallback_conversions, got.load_report.fallback_conversions) == (0, 2 * LAYERS)
    assert {layer.name for layer in got.load_report.layers} == {layer.name for layer in want.load_report.layers}
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_plan_has_room_for_what_the_codes_become(coded: Path) -> None:
    gate_up = 4 * 2 * 32 * 64
    read, in_bf16, made = gate_up // 2 + gate_up // 16, gate_up // 2 + gate_up // 16, 2 * gate_up
    slack = plan_quantized(coded, "quark_mxfp4").plan.memory.slack_bytes
    assert slack >= (64 << 20) + 2 * (read + 2 * in_bf16 + 2 * made)


def test_codes_without_their_scales_are_an_error(coded: Path, tmp_path: Path) -> None:
    path = with_tensors(coded, tmp_path, {}, without=("_scale", "_amax", "_outer_scale_denominator"))
    with pytest.raises(MissingWeightsError, match=r"gate_up_proj needs 3 more checkpoint tensors: .*w13_weight_scale"):
        load_quantized(path, "none")
