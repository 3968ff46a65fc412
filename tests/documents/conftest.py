"""What commands and Python in the documents name: models, a key, a bucket, all made of the bundled demo model."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from quantload import convert_checkpoint
from quantload.cli import DEMO_MODEL
from range_server import RangeServer
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "server"))  # last, so that its module names hide nothing

NAMES = ("MODEL", "Qwen/Qwen3-30B-A3B", "org/model", "org/model-step-200")
"""Names of checkpoints in documents that are the demo model here: commands run in a folder that has them."""


@pytest.fixture(scope="session")
def named_files(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A folder with all that documents name, to run their code in."""
    folder = tmp_path_factory.mktemp("documents")
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(DEMO_MODEL)
    convert_checkpoint(DEMO_MODEL, folder / "MODEL-FP8", "fp8_per_channel")
    convert_checkpoint(DEMO_MODEL, folder / "MODEL-MXFP4", "quark_mxfp4")
    (folder / "org" / "model-FP8").symlink_to(folder / "MODEL-FP8")
    (folder / "gpt-oss-BF16").symlink_to(golden / "bf16_gptoss")
    (folder / "FILE").write_text("a-key-of-this-test\n")
    (folder / "TEXT.txt").write_text(Path(shutil.__file__).read_text()[:2000])
    _save_adapter(folder / "runs" / "7" / "adapter")
    return folder


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A server that is a web server, S3 and the hub, with the demo model in each."""
    pytest.importorskip("obstore")
    for name in ("Qwen3-30B-A3B", "models/Qwen3-30B-A3B"):
        shutil.copytree(DEMO_MODEL, tmp_path / "served" / name)
    with RangeServer(tmp_path / "served") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for constant, there in server.of_hub().items():
            monkeypatch.setattr(huggingface_hub.constants, constant, there)
        yield server


@pytest.fixture
def in_named_files(named_files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder has what documents name; what a command changes in this process is put back."""
    monkeypatch.chdir(named_files)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    before = signal.getsignal(signal.SIGTERM)
    loggers = [logging.getLogger(name) for name in (None, "quantload", "uvicorn", "transformers", "py.warnings")]
    states = [(each, list(each.handlers), each.level, each.propagate) for each in loggers]
    yield named_files
    signal.signal(signal.SIGTERM, before)
    for each, handlers, level, propagate in states:
        each.handlers[:], each.level, each.propagate = handlers, level, propagate


def _save_adapter(folder: Path) -> None:
    """A LoRA adapter as PEFT saves it, on one layer of the demo model."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pairs = {f"{module}.lora_A.weight": torch.ones(4, width), f"{module}.lora_B.weight": torch.full((heads, 4), 1e-3)}
    folder.mkdir(parents=True)
    save_file(pairs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": 4, "bias": "none"})
    )
