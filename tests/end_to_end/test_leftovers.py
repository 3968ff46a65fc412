"""Tensors that the model does not know, as in transformers: left out with a warning, or an error if strict."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import raw_checkpoint
import torch
from architectures import BY_NAME, logits, reference
from quantload import LoadOptions, convert_checkpoint, load_quantized, plan_quantized
from quantload.checkpoint import source
from quantload.cli import app
from quantload.errors import CheckpointError, UnexpectedWeightsError
from torch import Tensor
from typer.testing import CliRunner

Checkpoint = Callable[[str], Path]
STRICT = LoadOptions(strict=True)


def _matrix(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.bfloat16)  # nobody may look at it


LEFT = {
    # A checkpoint for pretraining, of which the masked language model has a part.
    "bert": {
        "cls.seq_relationship.weight": _matrix(2, 64),
        "cls.seq_relationship.bias": _matrix(2),
        "bert.pooler.dense.weight": _matrix(64, 64),
        "bert.pooler.dense.bias": _matrix(64),
    },
    # A layer for multi-token prediction, and the biases of a config that has none.
    "llama": {
        "model.layers.2.eh_proj.weight": _matrix(64, 128),
        "model.layers.2.self_attn.q_proj.weight": _matrix(64, 64),
        "model.layers.2.enorm.weight": _matrix(64),
        "model.layers.0.self_attn.q_proj.bias": _matrix(64),
    },
    "qwen3_moe": {"mtp.layers.0.mlp.experts.0.up_proj.weight": _matrix(32, 64), "mtp.norm.weight": _matrix(64)},
}
IGNORED = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "bert": {"bert.embeddings.position_ids": torch.arange(64).view(1, -1)},
    "deepseek_v3": {"model.layers.61.eh_proj.weight": _matrix(64, 128), "model.layers.61.enorm.weight": _matrix(64)},
}
"""What the class, or transformers for all classes, passes over without a word."""


def with_more(name: str, more: dict[str, Tensor], checkpoint: Checkpoint, folder: Path) -> Path:
    return raw_checkpoint.write(folder, checkpoint(name), [{**more, **raw_checkpoint.read(checkpoint(name))}])


@pytest.mark.parametrize("name", LEFT)
def test_what_the_class_does_not_know_is_left_out_with_a_warning(
    name: str, checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_more(name, LEFT[name], checkpoint, tmp_path / "more")
    with caplog.at_level(logging.WARNING, "quantload"):
        got = load_quantized(path, "none")
    want, inputs = reference(path, BY_NAME[name]), BY_NAME[name].inputs()
    assert torch.equal(logits(got, inputs), logits(want, inputs))
    report = got.load_report
    assert report.unexpected == sorted(LEFT[name])
    assert report.unexpected_bytes == sum(tensor.nbytes for tensor in LEFT[name].values())
    assert report.bytes_read == report.checkpoint_bytes - report.unexpected_bytes
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{len(LEFT[name])} checkpoint tensors ({report.unexpected_bytes:,} bytes) that no ")
    assert min(LEFT[name]) in said

    without = load_quantized(checkpoint(name), "quark_mxfp4").state_dict()
    quantized = load_quantized(path, "quark_mxfp4").state_dict()
    assert without.keys() == quantized.keys()
    assert all(torch.equal(without[key], tensor) for key, tensor in quantized.items())
    with pytest.raises(UnexpectedWeightsError, match=f"^{len(LEFT[name])} checkpoint tensors .*{min(LEFT[name])}"):
        load_quantized(path, options=STRICT)


@pytest.mark.parametrize("name", IGNORED)
def test_what_the_class_passes_over_is_counted(
    name: str, checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_more(name, IGNORED[name], checkpoint, tmp_path / "more")
    with caplog.at_level(logging.WARNING, "quantload"):
        report = load_quantized(path, options=STRICT).load_report
    assert (report.unexpected, report.ignored_tensors) == ([], len(IGNORED[name]))
    assert not caplog.records


def test_the_plan_says_so_before_anything_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = with_more("bert", LEFT["bert"], checkpoint, tmp_path / "more")
    said = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"]).stdout)
    assert said["unexpected"] == sorted(LEFT["bert"])
    assert said["unexpected_bytes"] == sum(tensor.nbytes for tensor in LEFT["bert"].values())
    shown = CliRunner().invoke(app, ["plan", str(path)]).stdout
    assert "unexpected, not loaded" in shown
    with pytest.raises(UnexpectedWeightsError, match="seq_relationship"):
        plan_quantized(path, options=STRICT)


def test_not_a_byte_of_them_is_read(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie in a shard of their own, of which only the header is looked at."""
    tensors = raw_checkpoint.read(checkpoint("llama"))
    path = raw_checkpoint.write(tmp_path / "two", checkpoint("llama"), [tensors, LEFT["llama"]])
    wanted, spans = load_quantized(path, "none").state_dict(), []
    header, _ = raw_checkpoint.split_header(path / "model-00002-of-00002.safetensors")
    read = source.FileSource.read_into

    def remembered(self: source.FileSource, name: str, offset: int, buffer: memoryview) -> int:
        spans.append((name, offset, len(buffer)))
        return read(self, name, offset, buffer)

    monkeypatch.setattr(source.FileSource, "read_into", remembered)
    model = load_quantized(path, "none")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    data = 8 + len(json.dumps(header))
    own = [(offset, length) for name, offset, length in spans if name.startswith("model-00002")]
    assert own
    assert all(offset + length <= data for offset, length in own)


def test_a_conversion_carries_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Other tools know some of them: they lie in the new checkpoint as they were, their modules among those kept."""
    path = with_more("llama", LEFT["llama"], checkpoint, tmp_path / "more")
    out = tmp_path / "out"
    report = convert_checkpoint(path, out, "fp8_per_channel", format="compressed-tensors")
    assert report.unexpected == sorted(LEFT["llama"])
    written = raw_checkpoint.read(out)
    assert LEFT["llama"].keys() <= written.keys()
    assert all(written[key].isnan().all() for key in LEFT["llama"])
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.2.eh_proj", "model.layers.2.self_attn.q_proj"} <= {*ignored}
    usual, again = load_quantized(checkpoint("llama"), "fp8_per_channel"), load_quantized(out)
    assert again.load_report.unexpected == sorted(LEFT["llama"])
    inputs = BY_NAME["llama"].inputs()
    assert torch.equal(logits(again, inputs), logits(usual, inputs))


def test_a_conversion_leaves_out_what_is_stored_quantized(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing in the new config would say what its codes stand for."""
    first = tmp_path / "fp8"
    convert_checkpoint(checkpoint("llama"), first, "fp8_per_channel", format="quark")
    tensors = raw_checkpoint.read(first)
    more = {name.replace("layers.1.", "layers.2."): t for name, t in tensors.items() if "layers.1." in name}
    path = raw_checkpoint.write(tmp_path / "more", first, [{**tensors, **more}])
    weights = {name for name in more if name.endswith("_proj.weight")}
    assert {*load_quantized(path).load_report.unexpected} == {name for name in more if "_scale" not in name}
    with caplog.at_level(logging.WARNING, "quantload"):
        convert_checkpoint(path, tmp_path / "out", "quark_mxfp4")
    written = raw_checkpoint.read(tmp_path / "out")
    assert not any(name.startswith("model.layers.2.") and "_proj" in name for name in written)
    assert "model.layers.2.input_layernorm.weight" in written
    assert any(f"{len(weights)} weights that are stored quantized" in r.getMessage() for r in caplog.records)
    load_quantized(tmp_path / "out")


def test_a_tensor_in_two_shards_is_that_of_the_shard_that_the_index_names(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, name = raw_checkpoint.read(checkpoint("llama")), "model.layers.0.mlp.down_proj.weight"
    new = tensors[name] * 2
    path = raw_checkpoint.write(tmp_path / "two", checkpoint("llama"), [tensors, {name: new}])
    index = json.loads((path / raw_checkpoint.INDEX).read_text())
    assert index["weight_map"][name].startswith("model-00002")
    with caplog.at_level(logging.WARNING, "quantload"):
        got = load_quantized(path, "none")
    want = reference(path, BY_NAME["llama"])  # which takes the last shard
    assert torch.equal(got.get_parameter(name), want.get_parameter(name))
    assert torch.equal(got.get_parameter(name), new)
    assert got.load_report.overlaid == [name]
    assert got.load_report.bytes_read == got.load_report.checkpoint_bytes
    assert any(f"1 tensors lie in more than one shard: {name}" in r.getMessage() for r in caplog.records)
    with pytest.raises(CheckpointError, match=f"1 tensors lie in more than one shard: {name}"):
        load_quantized(path, options=STRICT)

    index["weight_map"][name] = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"  # keeps the second shard in the index
    (path / raw_checkpoint.INDEX).write_text(json.dumps(index))
    assert torch.equal(load_quantized(path, "none").get_parameter(name), tensors[name])
