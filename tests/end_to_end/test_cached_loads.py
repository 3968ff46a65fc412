"""Loads with a cache: what the second one reads, and what happens when something is wrong with what is there."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from quantized_models import state_bytes
from quantload import LoadOptions, load_quantized
from quantload.errors import LoadCancelledError, NonFiniteWeightError, PolicyError
from quantload.schemes.linear import QuantizedLinearScheme
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

Checkpoint = Callable[[str], Path]

CASES = [
    ("llama", "quark_mxfp4"),
    ("gpt2", "quark_mxfp4"),  # transposed linears, a tied head
    ("qwen3_moe", "fp8_per_tensor"),  # scales of fused shards stand side by side
    ("gpt_oss", "int8_per_channel"),  # transposed experts with biases
    ("qwen3_moe_odd", "fp8_per_block"),  # sizes that are not whole blocks
    ("gpt_oss_odd", "mxfp4_rows"),  # bytes of multipliers behind the scales
    ("qwen3_moe_odd", "nl4"),  # scales of rows beside those of blocks
    ("nomic_bert", "quark_mxfp4"),
    ("qwen3_vl_moe", "quark_mxfp4"),
    ("qwen3_moe", "experts_int8"),
]

FILES = ["model.safetensors", "config.json", "statistics.json", "entry.json", "checksums.crc32"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(path: Path, cache: Path, scheme: str = "quark_mxfp4", **options: Any) -> PreTrainedModel:
    return load_quantized(path, scheme, options=LoadOptions.from_mapping({"cache": cache, "workers": 2, **options}))


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.name != "lock"]


def entry(cache: Path) -> Path:
    (found,) = entries(cache)
    return found


def cached(models: list[PreTrainedModel]) -> list[str | None]:
    return [model.load_report.cache for model in models]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_second_load_gives_the_same_model_and_the_same_layers(
    name: str, scheme: str, checkpoint: Checkpoint, cache: Path
) -> None:
    plain = load_quantized(checkpoint(name), scheme)
    models = [load(checkpoint(name), cache, scheme, chunk_bytes=8192 << number) for number in range(3)]
    assert cached(models) == ["written", "hit", "hit"]
    for model in models:
        assert state_bytes(model) == state_bytes(plain)
        assert model.load_report.kept == plain.load_report.kept
        assert model.load_report.final_bytes == plain.load_report.final_bytes
        assert getattr(model, "generation_config", None) == getattr(plain, "generation_config", None)
        assert str(model.config) == str(plain.config)
    # Statistics are sums over pieces, so that they depend on where those are cut; those of the entry do not.
    assert models[1].load_report.layers == models[2].load_report.layers == models[0].load_report.layers
    assert len(models[0].load_report.layers) == len(plain.load_report.layers)
    inputs = architectures.BY_NAME[name].inputs()
    assert torch.equal(architectures.logits(models[1], inputs), architectures.logits(plain, inputs))


def test_the_second_load_reads_the_tensors_of_the_entry_and_nothing_else(checkpoint: Checkpoint, cache: Path) -> None:
    first, second = (load(checkpoint("llama"), cache) for _ in range(2))
    tensors = load_file(entry(cache) / "model.safetensors")
    assert first.load_report.bytes_read == first.load_report.checkpoint_bytes
    assert second.load_report.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert second.load_report.bytes_read < first.load_report.bytes_read / 1.5
    assert tensors.keys() == {*second.state_dict()}
    assert second.load_report.staging_peak_bytes <= first.load_report.staging_peak_bytes


def test_the_entry_says_what_its_codes_mean(checkpoint: Checkpoint, cache: Path) -> None:
    """`quant_method` quantload: an entry is a small checkpoint, which opens as one."""
    model = load(checkpoint("qwen3_moe"), cache)
    config = json.loads((entry(cache) / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quantload"
    again = load_quantized(entry(cache))
    assert state_bytes(again) == state_bytes(model)


def test_tied_weights_are_stored_once(checkpoint: Checkpoint, cache: Path) -> None:
    load(checkpoint("gpt2"), cache)
    names = load_file(entry(cache) / "model.safetensors").keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_codes_are_stored_before_a_kernel_rearranges_them(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_quantized(checkpoint("llama")).state_dict()

    def rearrange(scheme: QuantizedLinearScheme, layer: torch.nn.Module) -> None:
        layer.state_dict()["weight"].bitwise_not_()

    monkeypatch.setattr(QuantizedLinearScheme, "process_weights_after_loading", rearrange)
    models = [load(checkpoint("llama"), cache) for _ in range(2)]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(load_file(entry(cache) / "model.safetensors")[name], plain[name])
    assert all(torch.equal(model.state_dict()[name], ~plain[name]) for model in models)


@pytest.mark.parametrize("damage", ["first", "middle", "last", "shorter", "longer", "empty", "gone"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "statistics.json", "entry.json", "checksums.crc32"]
)
def test_a_damaged_entry_is_noticed_and_written_anew(
    file: str, damage: str, checkpoint: Checkpoint, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(checkpoint("llama"), cache)
    path = entry(cache) / file
    data = bytearray(path.read_bytes())
    positions = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}
    if damage in positions:
        data[positions[damage]] ^= 4
    changed: dict[str, bytes | bytearray] = {"shorter": data[:-1], "longer": data + b"\0", "empty": b""}
    path.write_bytes(changed.get(damage, data))
    if damage == "gone":
        path.unlink()
    caplog.clear()
    models = [load(checkpoint("llama"), cache) for _ in range(2)]
    assert cached(models) == ["rebuilt", "hit"]
    assert all(state_bytes(model) == state_bytes(first) for model in models)
    assert all(model.load_report.layers == first.load_report.layers for model in models)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith(f"Cache: an entry of {cache} is damaged and will be written anew: ")


@pytest.mark.parametrize("damage", ["header", "data", "gone", "index"])
def test_damage_in_one_of_several_files(
    damage: str, checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantload.cache.recording.MAX_SHARD_BYTES", 20_000)
    first = load(checkpoint("llama"), cache)
    others = sorted(entry(cache).glob("*.safetensors"))[1:]
    assert others
    path = entry(cache) / "model.safetensors.index.json" if damage == "index" else others[-1]
    data = bytearray(path.read_bytes())
    data[20 if damage == "header" else -20] ^= 1
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    models = [load(checkpoint("llama"), cache) for _ in range(2)]
    assert cached(models) == ["rebuilt", "hit"]
    assert all(state_bytes(model) == state_bytes(first) for model in models)


def test_an_entry_with_other_tensors_than_the_model_is_damaged(checkpoint: Checkpoint, cache: Path) -> None:
    """Such as one that another release of transformers would have made, whose version were not in the key."""
    first = load(checkpoint("llama"), cache)
    other = load(checkpoint("qwen3_moe"), cache)
    mine, wrong = sorted(entries(cache), key=lambda path: "mlp.experts" in (path / "config.json").read_text())
    shutil.rmtree(mine)
    wrong.rename(mine)
    model = load(checkpoint("llama"), cache)
    assert model.load_report.cache == "rebuilt"
    assert state_bytes(model) == state_bytes(first)
    assert other.load_report.cache == "written"


def test_an_entry_without_statistics_serves_only_those_who_want_none(checkpoint: Checkpoint, cache: Path) -> None:
    models = [load(checkpoint("llama"), cache, stats=stats) for stats in (False, False, True, True, False)]
    assert cached(models) == ["written", "hit", "written", "hit", "hit"]
    assert [model.load_report.layers[0].sqnr_db is None for model in models] == [True, True, False, False, True]


@pytest.mark.parametrize("change", [{"scheme": "fp8_per_channel"}, {"name": "gpt2"}])
def test_another_load_has_another_entry(change: dict[str, str], checkpoint: Checkpoint, cache: Path) -> None:
    load(checkpoint("llama"), cache)
    model = load(checkpoint(change.get("name", "llama")), cache, change.get("scheme", "quark_mxfp4"))
    assert model.load_report.cache == "written"
    assert len(entries(cache)) == 2


def test_the_least_recently_used_entry_goes(checkpoint: Checkpoint, cache: Path) -> None:
    schemes = ["quark_mxfp4", "fp8_per_channel", "quark_mxfp4", "int8_per_channel", "quark_mxfp4", "fp8_per_channel"]
    models = [load(checkpoint("llama"), cache, scheme, cache_bytes=230_000) for scheme in schemes]
    assert cached(models) == ["written", "written", "hit", "written", "hit", "written"]
    assert sum(path.stat().st_size for folder in entries(cache) for path in folder.iterdir()) <= 230_000


def test_nothing_is_cached_that_would_not_be_smaller(
    checkpoint: Checkpoint, golden: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quantload")
    for path, reason in ((checkpoint("llama"), "as large as"), (golden / "quark_llama_fp8", "itself is quantized")):
        model = load(path, cache, "none")
        assert model.load_report.cache == "unwritten"
        assert reason in caplog.text
    assert not cache.exists()


def test_what_is_quantized_anew_is_cached(golden: Path, cache: Path) -> None:
    models = [load(golden / "quark_llama_fp8", cache, "quark_mxfp4") for _ in range(2)]
    assert cached(models) == ["written", "hit"]
    assert state_bytes(models[0]) == state_bytes(models[1])


@pytest.mark.parametrize("where", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written_to_is_a_warning(
    where: str, checkpoint: Checkpoint, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(*{"mkdir": (Path, "mkdir"), "open": (os, "truncate")}[where], read_only)
    model = load(checkpoint("llama"), cache)
    assert model.load_report.cache == "unwritten"
    assert state_bytes(model) == state_bytes(load_quantized(checkpoint("llama")))
    assert f"Cache: nothing was written to {cache}: Read-only file system" in caplog.text


def test_a_cache_that_may_only_be_read_is_read(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint("llama"), cache)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for call in ("utime", "mkdir", "rename", "unlink", "truncate", "pwrite"):
        monkeypatch.setattr(os, call, read_only)
    assert load(checkpoint("llama"), cache).load_report.cache == "hit"


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "rename"])
def test_a_full_disk_is_a_warning_and_leaves_nothing(
    call: str, checkpoint: Checkpoint, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(os, call), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == {"pwrite": 5}.get(call, 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        model = load(checkpoint("llama"), cache)
    assert model.load_report.cache == "unwritten"
    assert len(model.load_report.layers) == len(load_quantized(checkpoint("llama")).load_report.layers)
    assert f"Cache: nothing was written to {cache}: No space left on device" in caplog.text
    assert load(checkpoint("llama"), cache).load_report.cache == "written"
    assert len(entries(cache)) == 1


def test_what_the_last_layer_raises_after_it_was_written_is_no_trouble_of_the_cache(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = len(load_quantized(checkpoint("llama")).load_report.layers)
    calls: list[torch.nn.Module] = []

    def fail(scheme: QuantizedLinearScheme, layer: torch.nn.Module) -> None:
        calls.append(layer)
        if len(calls) == layers:
            raise OSError(errno.EIO, "no kernel for this layer")

    monkeypatch.setattr(QuantizedLinearScheme, "process_weights_after_loading", fail)
    with pytest.raises(OSError, match="no kernel for this layer"):
        load(checkpoint("llama"), cache)
    assert entries(cache) == []


def test_a_file_is_no_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PolicyError, match=r"the cache '.*file' is a file; give a folder"):
        load(checkpoint("llama"), tmp_path / "file")


def test_a_load_that_fails_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path, cache: Path) -> None:
    threads = threading.active_count()
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightError):
        load(path, cache)
    assert entries(cache) == []
    assert threading.active_count() == threads


def test_a_cancelled_load_leaves_nothing(checkpoint: Checkpoint, cache: Path) -> None:
    def cancel(done: int, total: int) -> None:
        raise LoadCancelledError("enough")

    with pytest.raises(LoadCancelledError):
        load_quantized(checkpoint("llama"), options=LoadOptions(cache=cache), progress=cancel)
    assert entries(cache) == []


CHILD = """
import hashlib, os, sys
from pathlib import Path
from quantload import LoadOptions, load_quantized
from quantload.cache.writer import TensorWriter
if sys.argv[3:] == ["killed"]:
    TensorWriter.finish = lambda self: os.kill(os.getpid(), 9)
print("ready", flush=True)
sys.stdin.readline()
model = load_quantized(sys.argv[1], options=LoadOptions(cache=sys.argv[2]))
print(model.load_report.cache, flush=True)
"""


def child(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_load_that_is_killed_leaves_nothing_that_looks_finished(checkpoint: Checkpoint, cache: Path) -> None:
    with child(checkpoint("llama"), cache, "killed") as process:
        process.communicate("\n")
    assert process.returncode == -9
    (left,) = entries(cache)
    assert left.name.startswith(".quantload-writing-")
    assert (left / "model.safetensors").stat().st_size > 0
    models = [load(checkpoint("llama"), cache) for _ in range(2)]
    assert cached(models) == ["written", "hit"]
    assert len(entries(cache)) == 1


@pytest.mark.slow
def test_loads_at_once_share_one_writer(checkpoint: Checkpoint, cache: Path) -> None:
    processes = [child(checkpoint("llama"), cache) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate()[0].strip() for process in processes]
    assert "written" in results
    assert set(results) <= {"written", "unwritten", "hit"}
    assert load(checkpoint("llama"), cache).load_report.cache == "hit"
    assert len(entries(cache)) == 1


def test_who_comes_while_an_entry_is_written_reads_the_checkpoint(
    checkpoint: Checkpoint, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quantload")
    second: list[PreTrainedModel] = []

    def meanwhile(done: int, total: int) -> None:
        if not second:
            second.append(load(checkpoint("llama"), cache))

    first = load_quantized(checkpoint("llama"), options=LoadOptions(cache=cache), progress=meanwhile)
    assert cached([first, *second]) == ["written", "unwritten"]
    assert f"Cache: another load is writing this entry of {cache}; this one writes nothing" in caplog.text
    assert state_bytes(first) == state_bytes(second[0])
