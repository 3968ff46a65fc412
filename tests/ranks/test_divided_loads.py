"""Every rank holds exactly its slices of the codes and scales that one process makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretended import assert_slices, load_ranks
from quantload import QuantizationPolicy, load_quantized
from quantload.cli import DEMO_MODEL
from quantload.errors import PolicyError, UnsupportedCheckpointError
from tiny import MODELS, folder

SCHEMES = (
    "quark_mxfp4", "nvfp4", "int4_per_group", "quark_int4fp8_moe", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8",
    "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel", "experts_int8",
)  # fmt: skip
ONE_PASS = {"quark_mxfp4", "mxfp8"}


def check(path: Path, scheme: str, ranks: int, expert_parallel: bool, policy: QuantizationPolicy | None = None) -> None:
    whole = load_quantized(path, scheme, policy=policy, progress=False)
    parts = load_ranks(path, scheme, ranks, expert_parallel, policy)
    assert_slices(whole, parts)
    assert all(plan.shares for _, plan in parts)
    if scheme in ONE_PASS:
        for model, plan in parts:
            report = model.load_report
            shared = report.replicated_bytes + (report.checkpoint_bytes if plan.heads_per_kv else 0)
            assert report.bytes_read <= 1.05 * (report.checkpoint_bytes - report.replicated_bytes) / ranks + shared
            assert report.bytes_between < report.checkpoint_bytes


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor"])
def test_two_ranks_have_the_slices_of_one_process(scheme: str) -> None:
    check(DEMO_MODEL, scheme, 2, expert_parallel=False)


def test_ranks_with_whole_experts_have_those_of_one_process() -> None:
    check(DEMO_MODEL, "quark_mxfp4", 2, expert_parallel=True)


def test_more_ranks_than_key_and_value_heads(tmp_path: Path) -> None:
    check(folder("few_kv_heads", tmp_path), "fp8_per_channel", 4, expert_parallel=False)


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_and_architecture(
    name: str, scheme: str, ranks: int, expert_parallel: bool, tmp_path: Path
) -> None:
    if expert_parallel and name in ("llama", "few_kv_heads"):
        pytest.skip("no experts")
    check(folder(name, tmp_path), scheme, ranks, expert_parallel)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma3_text", "deepseek_v3", "llama4_text", "qwen2_moe", "olmoe"])
def test_plans_of_other_architectures(name: str, tmp_path: Path) -> None:
    check(folder(name, tmp_path), "fp8_per_tensor", 2, expert_parallel=False)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "mxfp8"])
def test_scales_of_least_error(scheme: str, tmp_path: Path) -> None:
    check(folder("qwen3_moe", tmp_path), scheme, 2, expert_parallel=False, policy=QuantizationPolicy(scale_mode="mse"))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["auto", "fp8_per_channel"])
@pytest.mark.parametrize(
    "name",
    [
        "ct_llama_fp8_dynamic", "ct_llama_mxfp4", "ct_llama_w8a8", "native_gptoss_mxfp4", "native_llama_gptq",
        "quark_llama_int4_fp8", "quark_llama_mxfp6_e2m3", "quark_qwen3moe_mxfp4",
    ],
)  # fmt: skip
def test_checkpoints_that_are_quantized_already(name: str, quantization: str, golden: Path) -> None:
    check(golden / name, quantization, 2, expert_parallel=False)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("mxfp4_rows", "by the error of all of its 256 columns, and a rank has 0 to 128 of them"),
        ("int4_per_group", "a rank has columns 0 to 64 of 128, and 128 of them share a scale"),
        ("fp8_per_block", "a rank has rows 0 to 64 of 128, and 128 of them share a scale"),
    ],
)
def test_a_block_that_two_ranks_would_divide_is_refused_with_the_numbers(scheme: str, expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        load_ranks(DEMO_MODEL, scheme, 2)


def test_a_model_without_a_plan_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="GPT2LMHeadModel has no plan"):
        load_ranks(folder("gpt2", tmp_path), "quark_mxfp4", 2)
