"""Converting as a user does it: any cut gives the same files, any interruption too, and errors leave nothing behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import raw_checkpoint
import torch
from quantload import (
    LoadOptions,
    LoadReport,
    QuantizationPolicy,
    QuantloadError,
    convert_checkpoint,
    load_quantized,
)
from quantload.errors import CheckpointError, MemoryBudgetError, NonFiniteWeightError, OutputError, TruncatedShardError

KILLED_AT_A_WRITE = """
import os, signal, sys
from quantload import LoadOptions, convert_checkpoint

left = int(sys.argv[3])
write = os.pwrite

def pwrite(fd, data, offset):
    global left
    left -= 1
    if left < 0:
        write(fd, data[:len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(fd, data, offset)

os.pwrite = pwrite
options = LoadOptions(chunk_bytes=4096, workers=2)
report = convert_checkpoint(sys.argv[1], sys.argv[2], "quark_mxfp4", options=options, max_shard_bytes=60_000)
print(report.bytes_read)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert_checkpoint(golden / "bf16_qwen3moe", out, "quark_mxfp4")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return raw_checkpoint.read(folder)


@pytest.mark.parametrize(
    "options",
    [
        LoadOptions(chunk_bytes=4096, workers=3),
        LoadOptions(workers=1, stats=False),
        LoadOptions(kernels={"quantize": "torch"}, workers=2),
    ],
    ids=["small pieces", "one worker", "another kernel"],
)
def test_the_files_do_not_depend_on_how_they_are_made(
    options: LoadOptions, converted: Path, golden: Path, tmp_path: Path
) -> None:
    convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", "quark_mxfp4", options=options)
    assert files(tmp_path / "out") == files(converted)


@pytest.mark.parametrize("max_shard_bytes", [1, 100_000])
def test_shards(max_shard_bytes: int, converted: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(golden / "bf16_qwen3moe", out, "quark_mxfp4", max_shard_bytes=max_shard_bytes)
    index = json.loads((out / raw_checkpoint.INDEX).read_text())
    got, want = weights(out), weights(converted)
    assert got.keys() == index["weight_map"].keys() == want.keys()
    assert all(torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    shards = sorted(out.glob("*.safetensors"))
    assert [shard.name for shard in shards] == sorted(set(index["weight_map"].values()))
    limit = max(max_shard_bytes, max(t.nbytes for t in want.values()))
    assert all(sum(t.nbytes for t in weights_of(shard).values()) <= limit for shard in shards)


def weights_of(shard: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(shard)


def test_small_files_come_along(golden: Path, converted: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden / "bf16_qwen3moe", source)
    (source / "tokenizer.json").write_text("{}")
    vocabularies = {"vocab.txt", "tokenizer.model", "qwen.tiktoken", "source.spm", "bpe.codes", "prophetnet.tokenizer"}
    for name in vocabularies:
        (source / name).write_text("words")
    (source / "nested").mkdir()
    (source / "nested/chat_template.jinja").write_text("hello")
    (source / "pytorch_model.bin").write_text("a pickle")
    (source / ".cache").mkdir()
    (source / ".cache/download.json").write_text("{}")
    convert_checkpoint(source, tmp_path / "out", "quark_mxfp4")
    more = files(tmp_path / "out").keys() - files(converted).keys()
    assert more == {"tokenizer.json", "nested/chat_template.jinja", *vocabularies}


def test_a_folder_inside_the_model(golden: Path, converted: Path, tmp_path: Path) -> None:
    source = tmp_path / "bf16_qwen3moe"
    shutil.copytree(golden / "bf16_qwen3moe", source)
    (source / "other.unfinished/files").mkdir(parents=True)
    (source / "other.unfinished/files/vocab.json").write_text("{}")
    convert_checkpoint(source, source / "out", "quark_mxfp4")
    assert files(source / "out") == files(converted)


def run_until_killed(source: Path, out: Path, writes: int) -> int:
    """A conversion that is killed in the middle of a write after so many; the bytes it read, if it came to its end."""
    command = [sys.executable, "-c", KILLED_AT_A_WRITE, str(source), str(out), str(writes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return int(done.stdout)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    return 0


def check_result(out: Path, converted: Path) -> None:
    got, want = weights(out), weights(converted)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want)
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_was(golden: Path, converted: Path, tmp_path: Path) -> None:
    source, out = golden / "bf16_qwen3moe", tmp_path / "out"
    assert run_until_killed(source, out, 150) == 0
    read = run_until_killed(source, out, 10**6)
    assert 0 < read < sum(tensor.nbytes for tensor in weights(source).values())
    check_result(out, converted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_writes_again_and_again(seed: int, golden: Path, converted: Path, tmp_path: Path) -> None:
    source, out = golden / "bf16_qwen3moe", tmp_path / "out"
    choose = random.Random(seed)
    kills = 0
    while run_until_killed(source, out, choose.randrange(200)) == 0:
        kills += 1
        assert kills < 60
    assert kills > 0
    check_result(out, converted)


class Stop(Exception):
    pass


def stopped(source: Path, out: Path, *, policy: QuantizationPolicy | None = None, stats: bool = True) -> None:
    """A conversion that finishes some shards and is stopped."""

    def progress(done: int, total: int) -> None:
        if done:
            raise Stop

    options = LoadOptions(workers=1, stats=stats)
    with pytest.raises(Stop):
        convert_checkpoint(
            source, out, "quark_mxfp4", policy=policy, options=options, max_shard_bytes=30_000, progress=progress
        )
    assert list(out.with_name(f"{out.name}.unfinished").glob("files/*.safetensors"))


def test_a_changed_option_starts_anew(golden: Path, converted: Path, tmp_path: Path) -> None:
    stopped(golden / "bf16_qwen3moe", tmp_path / "out")
    convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", "quark_mxfp4")
    assert files(tmp_path / "out") == files(converted)


def test_another_rule_for_scales_starts_anew(golden: Path, tmp_path: Path) -> None:
    """The same tensors of the same shapes."""
    source, policy = golden / "bf16_qwen3moe", QuantizationPolicy(scale_mode="mse")
    stopped(source, tmp_path / "out")
    for out in ("out", "want"):
        convert_checkpoint(source, tmp_path / out, "quark_mxfp4", policy=policy, max_shard_bytes=30_000)
    assert files(tmp_path / "out") == files(tmp_path / "want")


def test_statistics_that_were_not_measured_are_measured_anew(golden: Path, tmp_path: Path) -> None:
    stopped(golden / "bf16_qwen3moe", tmp_path / "out", stats=False)
    report = convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", "quark_mxfp4", max_shard_bytes=30_000)
    assert all(layer.sqnr_db is not None for layer in report.layers)


def trained(shard: Path) -> None:
    """Other weights of the same shapes, in a file as large."""
    header, data = raw_checkpoint.split_header(shard)
    raw_checkpoint.join_header(shard, header, data[:100] + data[102:] + data[100:102])
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))


def test_other_weights_start_anew(golden: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden / "bf16_qwen3moe", source)
    stopped(source, tmp_path / "out")
    trained(source / "model.safetensors")
    for out in ("out", "want"):
        convert_checkpoint(source, tmp_path / out, "quark_mxfp4", max_shard_bytes=30_000)
    assert files(tmp_path / "out") == files(tmp_path / "want")


def test_weights_in_a_file_of_another_name(golden: Path, tmp_path: Path) -> None:
    """What is written has the usual names, and its config does not say otherwise."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(golden / "bf16_llama", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    (source / "model.safetensors").rename(source / "other.safetensors")
    convert_checkpoint(source, out, "quark_mxfp4")
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    assert load_quantized(out).load_report.quantization == "prequantized"


def test_a_corrected_config_of_a_quantized_checkpoint_starts_anew(golden: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden / "quark_llama_int4_fp8", source)
    right = (source / "config.json").read_text()
    wrong = json.loads(right)
    wrong["quantization_config"]["export"]["pack_method"] = "order"
    (source / "config.json").write_text(json.dumps(wrong))
    stopped(source, tmp_path / "out")
    assert list((tmp_path / "out.unfinished/files").glob("*.safetensors"))
    (source / "config.json").write_text(right)
    convert_checkpoint(source, tmp_path / "out", "quark_mxfp4", max_shard_bytes=30_000)
    convert_checkpoint(source, tmp_path / "want", "quark_mxfp4", max_shard_bytes=30_000)
    assert files(tmp_path / "out") == files(tmp_path / "want")


def test_a_resumed_report_has_every_layer(golden: Path, tmp_path: Path) -> None:
    whole = convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "whole", "quark_mxfp4")
    stopped(golden / "bf16_qwen3moe", tmp_path / "out")
    report = convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", "quark_mxfp4", max_shard_bytes=30_000)
    assert [layer.name for layer in report.layers] == [layer.name for layer in whole.layers]
    for layer, other in zip(report.layers, whole.layers, strict=True):
        assert layer.sqnr_db == pytest.approx(other.sqnr_db)
        assert layer.amax == other.amax


def test_the_report_is_that_of_a_load(golden: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert_checkpoint(
        golden / "bf16_qwen3moe", tmp_path / "out", "quark_mxfp4", progress=lambda done, all_: seen.append((done, all_))
    )
    online = load_quantized(golden / "bf16_qwen3moe", "quark_mxfp4").load_report
    assert {layer.name: layer for layer in report.layers} == {layer.name: layer for layer in online.layers}
    assert report.kept == online.kept
    assert report.final_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert report.predicted_peak_bytes == report.peak_bytes or report.peak_bytes < report.predicted_peak_bytes
    assert seen[-1] == (report.bytes_read, report.checkpoint_bytes)
    assert LoadReport.from_dict(report.to_dict()).quantization == "quark_mxfp4"


def broken(golden: Path, folder: Path) -> Path:
    shutil.copytree(golden / "bf16_llama", folder)
    return folder


def test_a_truncated_checkpoint(golden: Path, tmp_path: Path) -> None:
    source = broken(golden, tmp_path / "source")
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(TruncatedShardError):
        convert_checkpoint(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_weight_that_is_not_finite_is_named(golden: Path, tmp_path: Path) -> None:
    source = broken(golden, tmp_path / "source")
    tensors = weights(source)
    tensors["model.layers.1.mlp.up_proj.weight"][200, 9] = torch.nan
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite at index \[200, 9\]"
    ):
        convert_checkpoint(source, tmp_path / "out", "fp8_per_tensor")
    assert os.listdir(tmp_path) == ["source"]


def test_a_full_disk(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"cannot be written to .*: No space left on device; make room"):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "error"),
    [({"options": LoadOptions(max_memory=1)}, MemoryBudgetError), ({"max_shard_bytes": 0}, QuantloadError)],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    more: dict[str, object], error: type[Exception], golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", **more)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path, tmp_path / "out")
