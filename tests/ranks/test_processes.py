"""Ranks that are processes: what they compute together, and what becomes of all when one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from new_weights import changed_copy
from processes import run_ranks
from quantload import load_quantized
from quantload.cli import DEMO_MODEL
from tiny import folder

PROMPT = "def read_lines(path):\n"


def demo_ids() -> list[list[int]]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids: list[list[int]] = [tokenizer(PROMPT).input_ids]
    return ids


@torch.no_grad()
def assert_same_model(model: Any, found: list[dict[str, Any] | None], ids: list[list[int]], tokens: int) -> None:
    """The ranks generate what a model of one process does; their logits differ by the order of sums alone."""
    alone = torch.tensor(ids)
    expected = model.generate(alone, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    logits = model(alone).logits.float()
    for each in found:
        assert each is not None
        assert each["tokens"] == expected.tolist()
        difference = torch.tensor(each["logits"]) - logits
        assert float(difference.norm() / logits.norm()) < 0.02
    assert len({str(each["logits"]) for each in found if each}) == 1


@pytest.mark.slow
def test_two_ranks_generate_what_one_process_does_and_read_their_own_parts(tmp_path: Path) -> None:
    ids = demo_ids()
    found = run_ranks(2, tmp_path, path=str(DEMO_MODEL), scheme="fp8_per_tensor", ids=ids, tokens=12)
    assert_same_model(load_quantized(DEMO_MODEL, "fp8_per_tensor", progress=False), found, ids, tokens=12)
    reports = [each["report"] for each in found if each]
    assert [report["rank"] for report in reports] == [0, 1]
    assert reports[0]["rank_bytes_read"] == [report["bytes_read"] for report in reports]


@pytest.mark.slow
def test_ranks_compute_with_new_weights_also_after_a_reload_that_failed(tmp_path: Path) -> None:
    old, scheme = folder("gpt_oss", tmp_path), "fp8_per_channel"

    def with_nan(each: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if each == "model.layers.0.self_attn.o_proj.weight":
            tensor[1, -1] = torch.nan  # a column of the second rank
        return tensor

    bad, new = changed_copy(old, tmp_path / "bad", with_nan), changed_copy(old, tmp_path / "new")
    ids = [list(range(8, 20))]
    found = run_ranks(2, tmp_path, path=str(old), scheme=scheme, ids=ids, tokens=4, reloads=[str(bad), str(new)])
    assert_same_model(load_quantized(new, scheme, progress=False), found, ids, tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["killed", "raises"])
def test_a_rank_that_fails_ends_the_load_of_the_other(fails: str, tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path, path=str(DEMO_MODEL), scheme="fp8_per_tensor", ids=[[1]], tokens=1, fails=fails)
    assert found[1] is None
    assert found[0] is not None
    assert found[0]["error"] == "RankError"
    expected = "was killed, or ended" if fails == "killed" else "rank 1 failed: this rank was told to fail"
    assert expected in found[0]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "expert_parallel"),
    [
        ("llama", 2, False), ("phi3", 2, False), ("few_kv_heads", 4, False), ("qwen3_moe", 2, False),
        ("qwen3_moe", 4, True), ("gpt_oss", 2, True),
    ],
)  # fmt: skip
def test_every_architecture_computes_the_same(name: str, ranks: int, expert_parallel: bool, tmp_path: Path) -> None:
    path = folder(name, tmp_path)
    ids = [list(range(8, 20))]
    found = run_ranks(
        ranks, tmp_path, path=str(path), scheme="fp8_per_channel", ids=ids, tokens=4, expert_parallel=expert_parallel
    )
    assert_same_model(load_quantized(path, "fp8_per_channel", progress=False), found, ids, tokens=4)
