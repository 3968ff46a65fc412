"""`torchrun --nproc-per-node 2 -m quantload`, in processes of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers
from new_weights import changed_copy
from quantload import load_quantized
from quantload.cli import DEMO_MODEL
from quantload.memory.report import LoadReport

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
PROMPT = "def read_lines(path):\n"
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]


def run(*arguments: str, expected: int = 0) -> tuple[str, str]:
    """Standard output and error of both ranks together."""
    command = [*TORCHRUN, "-m", "quantload", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode == 0) == (expected == 0), done.stderr
    return done.stdout, done.stderr


def test_one_rank_tells_of_the_load_of_both(tmp_path: Path) -> None:
    stdout, stderr = run("load", "-q", "fp8_per_tensor", "--json", "--max-memory", "1GiB/host")
    told = json.loads(stdout)
    assert (told["rank"], told["world_size"], len(told["rank_bytes_read"])) == (0, 2, 2)
    assert stderr.count("Peak CPU memory during load_weights") == 1


def test_a_limit_of_the_host_is_that_of_both_ranks(tmp_path: Path) -> None:
    _, stderr = run("load", "--max-memory", "100MiB/host", expected=4)
    assert "the limit is 100.000 MiB" in stderr


def test_the_cache_has_an_entry_for_each_rank(tmp_path: Path) -> None:
    cache, reports = tmp_path / "cache", []
    for number in range(3):
        report = tmp_path / f"{number}.json"
        run("load", "-q", "fp8_per_channel", "--digest", "--cache", str(cache), "--report", str(report))
        reports.append(LoadReport.load(report))
        entries = [path for path in cache.iterdir() if path.is_dir()]
        assert len(entries) == 2
        if number == 1:
            damaged = max(entries[0].glob("*.safetensors"), key=lambda path: path.stat().st_size)
            content = bytearray(damaged.read_bytes())
            content[-1] ^= 1
            damaged.write_bytes(content)
    assert [report.cache for report in reports] == ["written", "hit", "rebuilt"]
    assert len({report.digest for report in reports}) == 1


def test_one_rank_prints_what_both_generate() -> None:
    stdout, _ = run(
        "generate", "-q", "quark_mxfp4", "-p", PROMPT, "--temperature", "0", "--max-new-tokens", "12", "--json"
    )
    told = json.loads(stdout)
    assert (told["text"], told["world_size"]) == (_text_of_one_process(), 2)
    stdout, _ = run("generate", "-q", "quark_mxfp4", "-p", PROMPT, "--temperature", "1", "--max-new-tokens", "4")
    assert stdout.endswith("\n")


def test_one_rank_answers_for_both_with_beams_and_new_weights(tmp_path: Path) -> None:
    model = changed_copy(DEMO_MODEL, tmp_path / "model", lambda _, tensor: tensor)
    (model / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0, "num_beams": 2}')
    changed_copy(DEMO_MODEL, tmp_path / "new")
    changed_copy(DEMO_MODEL, tmp_path / "bad", lambda name, tensor: tensor * float("nan"))
    (tmp_path / "key").write_text("secret")
    command = [*TORCHRUN, "-m", "quantload", "serve", str(model), "-q", "fp8_per_tensor", "--port", "0"]
    command += ["--reload-root", str(tmp_path), "--api-key-file", str(tmp_path / "key")]
    path = tmp_path / "log"
    with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            url = _url(server, path)
            with httpx.Client(base_url=url, timeout=300, headers={"authorization": "Bearer secret"}) as client:
                texts = [_text(client)]
                metrics = client.get("/metrics").text
                bad = client.post("/reload", json={"checkpoint": "bad"})
                refused = client.post("/v1/completions", json={"prompt": PROMPT})
                new = client.post("/reload", json={"checkpoint": "new"})
                texts.append(_text(client))
        finally:
            server.terminate()
            server.wait(300)
    assert path.read_text().count("Serving ") == 1
    folders = (model, tmp_path / "new")
    assert texts == [_text_of_one_process(folder, "fp8_per_tensor", num_beams=2) for folder in folders]
    assert [bad.status_code, refused.status_code, new.status_code] == [400, 503, 200]
    assert 'quantload_rank_bytes_read{rank="1"}' in metrics


def _url(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where a server answers, as soon as its log says so."""
    while (said := re.search(r"Serving \S+ at (\S+)", log.read_text())) is None:
        assert server.poll() is None, log.read_text()
        time.sleep(0.2)
    return said[1]


def _text(client: httpx.Client) -> str:
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12, "temperature": 0})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def _text_of_one_process(folder: Path = DEMO_MODEL, scheme: str = "quark_mxfp4", **more: Any) -> str:
    model: Any = load_quantized(folder, scheme, progress=False)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=12, do_sample=False, **more)
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text
