"""Tensors that few models have: weights without an element, counts that transformers turns into numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantload import load_quantized
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "int8_per_channel", "nvfp4"])
def test_a_weight_without_elements_is_kept(scheme: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=0, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, scheme)
    reasons = {each.name: each.reason for each in model.load_report.kept}
    assert reasons["model.layers.0.mlp.down_proj"] == "it has no elements"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_counts_that_transformers_turns_into_numbers_are_read_as_it_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BatchNorm among the modules that stay in float32: its count of batches becomes float32, too."""

    class WithBatchNorm(LlamaForCausalLM):  # type: ignore[misc]
        _keep_in_fp32_modules_strict = ["norm"]  # noqa: RUF012

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.batch_norm = torch.nn.BatchNorm1d(4)
            self.post_init()

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    original = WithBatchNorm(config).to(torch.bfloat16)
    original.batch_norm.num_batches_tracked.fill_(7)
    original.save_pretrained(tmp_path)
    monkeypatch.setattr("quantload.model.transformers_api.model_class", lambda *_: WithBatchNorm)
    theirs, ours = WithBatchNorm.from_pretrained(tmp_path, dtype="auto"), load_quantized(tmp_path, "int8_per_channel")
    wanted = theirs.get_buffer("batch_norm.num_batches_tracked")
    found = ours.get_buffer("batch_norm.num_batches_tracked")
    assert (found.dtype, found.item()) == (wanted.dtype, wanted.item()) == (torch.float32, 7)
