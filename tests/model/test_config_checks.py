"""What a config asks for is compared with what the checkpoint holds before anything is made of it."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import CheckpointError, UnsupportedCheckpointError
from quantload.model.config_checks import MODULES_ANYWAY, check_counts, modules_limited, most_modules
from quantload.planning import plan_quantized
from torch import nn

Checkpoint = Callable[[str], Path]
ROOT = Path("model")


def entries(*shapes: tuple[int, ...]) -> dict[str, TensorEntry]:
    return {
        str(number): TensorEntry(str(number), torch.uint8, shape, 0, 0, int(torch.tensor(shape).prod()))
        for number, shape in enumerate(shapes)
    }


def test_a_legal_big_model_passes() -> None:
    config = {
        "num_hidden_layers": 200, "n_routed_experts": 512, "num_nextn_predict_layers": 3, "num_labels": 30_000,
        "text_config": {"num_experts": 16_384}, "depths": [2, 200], "layer_types": ["full_attention"] * 200,
        "max_position_embeddings": 10**9, "num_params": 7 * 10**9, "n_ctx": 10**7, "total_num_tokens": 10**13,
        "pad_token_id": 10**6, "hidden_size": 10**6, "num_train_steps": 10**7, "vocab_size": 10**6,
    }  # fmt: skip
    check_counts(config, ROOT, entries((8, 8)))
    check_counts({"num_labels": 670_000}, ROOT, entries((670_000, 2)))
    assert most_modules([entries((4, 4))["0"]] * (200 * 512 * 3)) > 200 * 512 * 12


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"n_layer": 10**30}, "n_layer"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"text_config": {"num_local_experts": 10**9}}, "text_config.num_local_experts"),
        ({"depths": [2, 10**9]}, r"depths\[1\]"),
        ({"vision": [{"num_attention_heads": 10**9}]}, r"vision\[0\].num_attention_heads"),
        ({"num_codebooks": 1e12}, "num_codebooks"),
        ({"n_codebooks": 200_000}, "n_codebooks"),
    ],
)
def test_counts_that_nothing_fills_are_named(config: dict[str, Any], place: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^model/config\.json: {place} is .* copy the file from the original"):
        check_counts(config, ROOT, entries((100_000, 8), (0, 10**9)))


def test_experts_of_a_stack_count_one_by_one() -> None:
    assert most_modules(entries((64, 4, 4)).values()) - MODULES_ANYWAY == 64 * (
        most_modules(entries((4, 4)).values()) - MODULES_ANYWAY
    )


def test_modules_are_counted_in_one_thread_and_no_longer_than_asked() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))

    with modules_limited(30, ROOT):
        build()
        other = threading.Thread(target=build)
        other.start()
        other.join()
    with pytest.raises(CheckpointError, match="with more than 29 modules"), modules_limited(29, ROOT):
        build()
    assert len(list(build().children())) == 10


def peak_memory(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) << 10


HUGE = {
    "llama": {"num_hidden_layers": 100_000},
    "gpt2": {"n_layer": 10**9},
    "qwen3_moe": {"num_experts": 10**9},
}


@pytest.mark.parametrize("name", HUGE)
def test_nothing_is_built_that_the_checkpoint_cannot_fill(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(name), tmp_path / name))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | HUGE[name]))
    plan_quantized(checkpoint(name))  # what the first of a kind imports is not this one's
    gc.collect()
    before = peak_memory(reset=True)
    with pytest.raises(CheckpointError, match=rf"config\.json: ({next(iter(HUGE[name]))} is|asks for a)"):
        plan_quantized(folder)
    assert peak_memory() - before < 68 << 20


@pytest.mark.parametrize(
    "said",
    [
        {"attn_implementation": "somebody/attention"},
        {"attn_implementation": {"": "somebody/attention@main:run"}},
        {"_experts_implementation": "paged|somebody/experts"},
        {"vision_config": {"attn_implementation": "somebody/attention"}},
    ],
)
def test_kernels_of_the_hub_are_code_that_is_not_trusted(
    said: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json: .*fetched and run; remove"):
        plan_quantized(folder)
