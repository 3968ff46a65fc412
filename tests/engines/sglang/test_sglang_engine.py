"""A real SGLang engine on the CPU: it computes what `load_quantized` does, also after an update, also on two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantload import LoadReport
from sglang_checkpoints import PROMPTS, quantized, save

pytestmark = pytest.mark.sglang
HERE = Path(__file__).parent
TOKENS = 12
IGNORED = "*.0.self_attn.o_proj"


def run(script: str, asked: dict[str, Any], python_path: str, **environment: str) -> tuple[Any, str]:
    """What a script printed as its result, and all it wrote."""
    variables = {**os.environ, "PYTHONPATH": python_path, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), json.dumps(asked)],
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    (result,) = re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    return json.loads(result), done.stdout


def check_tokens(model: Path, scheme: str, answers: Any, python_path: str, ignore: tuple[str, ...] = ()) -> None:
    """Tokens are the likeliest ones, but for near ties, and as likely as `load_quantized` finds them."""
    chosen = [[token for token, _ in answer] for answer in answers]
    asked = {"model": str(model), "scheme": scheme, "ignore": ignore, "prompts": PROMPTS, "chosen": chosen}
    reference, _ = run("run_reference.py", asked, python_path)
    for answer, known in zip(answers, reference, strict=True):
        assert len(answer) == TOKENS
        for (_, got), (own, likeliest) in zip(answer, known, strict=True):
            assert likeliest - own < 0.1
            assert abs(got - own) < 0.1
        assert abs(sum(got for _, got in answer) - sum(own for own, _ in known)) < 0.25


def asked_of(model: Path, update: Path | None = None, **options: Any) -> dict[str, Any]:
    other = None if update is None else str(update)
    return {"model": str(model), "options": options, "prompts": PROMPTS, "tokens": TOKENS, "update": other}


def test_loading_and_updating(tmp_path: Path, python_path: str) -> None:
    """By SGLang's own name for the scheme, which SGLang runs on another GPU only, and with options.

    The update is from a checkpoint that is quantized already.
    """
    first, other = save(tmp_path / "first", 1), quantized(tmp_path, save(tmp_path / "other", 2), "awq")
    override = {"quantization_config": {"quant_method": "quark_mxfp4", "ignore": [IGNORED]}}
    asked = asked_of(first, other, quantization="quark_mxfp4", json_model_override_args=json.dumps(override))
    report_file = tmp_path / "report.json"
    (before, after, again), log = run("run_sglang.py", asked, python_path, QUANTLOAD_REPORT=str(report_file))
    lines = re.findall(r"quantload: quark_mxfp4, quantized_layers=(\d+), kept_layers=(\d+).* (\d+) tensors read", log)
    assert lines == [("5", "2", "0")] * 2  # of the first load and of the update; the head and what is ignored are kept
    report = LoadReport.load(report_file)
    assert {layer.scheme for layer in report.layers} == {"quark_mxfp4"}
    assert {layer.name: layer.reason for layer in report.kept} == {
        "lm_head": "output head",
        "model.layers.0.self_attn.o_proj": f"ignored by pattern '{IGNORED}'",
    }
    for model, answers in ((first, before), (other, after)):
        check_tokens(model, "quark_mxfp4", answers, python_path, (IGNORED,))
    assert again == before  # tensors that were handed over, q apart from k and v, as the files were read


def test_a_quantized_checkpoint_is_quantized_anew(tmp_path: Path, python_path: str) -> None:
    model = quantized(tmp_path, save(tmp_path / "original", 3), "fp8 blocks")
    asked = asked_of(model, quantization="quantload_int8_per_channel")
    report_file = tmp_path / "report.json"
    (answers,), _ = run("run_sglang.py", asked, python_path, QUANTLOAD_REPORT=str(report_file))
    report = LoadReport.load(report_file)
    assert ({layer.scheme for layer in report.layers}, len(report.layers)) == ({"int8_per_channel"}, 6)
    assert report.fallback_conversions == 0  # nothing was decoded whole
    assert report.bytes_read < 1.01 * report.checkpoint_bytes  # some scales twice, where a piece ends in their block
    check_tokens(model, "int8_per_channel", answers, python_path)


def test_two_ranks_read_each_its_part(tmp_path: Path, python_path: str) -> None:
    model = save(tmp_path / "model", 1)
    asked = asked_of(model, quantization="quantload_fp8_per_tensor", tp_size=2)
    reports = str(tmp_path / "report-{rank}.json")
    (answers,), _ = run(
        "run_sglang.py", asked, python_path, QUANTLOAD_REPORT=reports, SGLANG_CPU_OMP_THREADS_BIND="0|1"
    )
    for rank in range(2):
        report = LoadReport.load(tmp_path / f"report-{rank}.json")
        assert (report.rank, report.world_size, len(report.layers)) == (rank, 2, 6)
        first_pass = sum(layer.bytes_in for layer in report.layers)  # for scales of whole tensors
        assert report.bytes_read - first_pass < 0.75 * report.checkpoint_bytes
    check_tokens(model, "fp8_per_tensor", answers, python_path)
