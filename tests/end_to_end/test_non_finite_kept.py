"""NaN and infinities in weights that keep their values: loaded, counted and said, or refused where loads are strict."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantload import LoadOptions, convert_checkpoint, load_quantized
from quantload.checkpoint.output import OutputFolder
from quantload.errors import NonFiniteWeightError
from quantload.memory.metrics import LoadMetrics
from quantload.memory.report import LoadReport, NonFiniteReport
from raw_checkpoint import read, write

Checkpoint = Callable[[str], Path]

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPECTED = [
    NonFiniteReport(HEAD, nan=0, infinite=1, overflowed=0, first=[100, 11]),
    NonFiniteReport(EMBEDDING, nan=0, infinite=2, overflowed=0, first=[3, 1]),
    NonFiniteReport(NORM, nan=1, infinite=0, overflowed=0, first=[5]),
]


@pytest.fixture(scope="module")
def spoilt(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with a NaN in its last norm and infinities in embedding and head."""
    tensors = read(checkpoint("llama"))
    tensors[NORM][5] = math.nan
    tensors[EMBEDDING][90, 60], tensors[EMBEDDING][3, 1] = math.inf, -math.inf
    tensors[HEAD][100, 11] = math.inf
    return write(tmp_path_factory.mktemp("spoilt"), checkpoint("llama"), [tensors])


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "none"])
@pytest.mark.parametrize("chunk_bytes", [4096, 8 << 20])
def test_they_are_loaded_counted_and_said(
    scheme: str, chunk_bytes: int, spoilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="quantload"):
        model = load_quantized(spoilt, scheme, options=LoadOptions(chunk_bytes=chunk_bytes))
    assert model.model.norm.weight[5].isnan()
    assert model.model.embed_tokens.weight[3, 1] == -math.inf
    report = model.load_report
    assert report.non_finite == EXPECTED
    assert LoadReport.from_dict(json.loads(json.dumps(report.to_dict()))).non_finite == EXPECTED
    (said,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert "model.norm.weight (1 NaN; the first at [5])" in said
    metrics = LoadMetrics()
    metrics.on_report(report)
    lines = metrics.render().decode()
    assert 'quantload_non_finite_values{kind="nan"} 1.0' in lines
    assert 'quantload_non_finite_values{kind="infinite"} 3.0' in lines


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "none"])
def test_a_strict_load_refuses_them(scheme: str, spoilt: Path) -> None:
    with pytest.raises(
        NonFiniteWeightError, match=r"checkpoint tensor .* is not finite at index \[.*--strict"
    ) as caught:
        load_quantized(spoilt, scheme, options=LoadOptions(strict=True, workers=1))
    named = [
        each for each in EXPECTED if f"tensor {each.name} is not finite at index {each.first}" in str(caught.value)
    ]
    assert len(named) == 1, caught.value


def test_the_cache_brings_them_back_and_a_strict_load_refuses_them_there(spoilt: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for result in ("written", "hit"):
        report = load_quantized(spoilt, options=LoadOptions(cache=cache)).load_report
        assert (report.cache, report.non_finite) == (result, EXPECTED)
    with pytest.raises(NonFiniteWeightError):
        load_quantized(spoilt, options=LoadOptions(cache=cache, strict=True))


def test_a_conversion_copies_them_and_says_so(spoilt: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(spoilt, tmp_path / "out", "quark_mxfp4", options=LoadOptions(chunk_bytes=4097))
    assert report.non_finite == EXPECTED
    assert read(tmp_path / "out")[NORM][5].isnan()
    with pytest.raises(NonFiniteWeightError, match=r"is not finite at index"):
        convert_checkpoint(spoilt, tmp_path / "strict", "quark_mxfp4", options=LoadOptions(strict=True))
    assert not (tmp_path / "strict").exists()
    again = load_quantized(tmp_path / "out")
    assert again.load_report.non_finite == EXPECTED


def test_a_conversion_that_is_taken_up_knows_what_the_first_run_found(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: OutputFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(spoilt, tmp_path / "out", "quark_mxfp4", max_shard_bytes=20_000)
    with pytest.raises(NonFiniteWeightError):
        convert_checkpoint(
            spoilt, tmp_path / "out", "quark_mxfp4", max_shard_bytes=20_000, options=LoadOptions(strict=True)
        )
    report = convert_checkpoint(spoilt, tmp_path / "out", "quark_mxfp4", max_shard_bytes=20_000)
    assert report.bytes_read == 0
    assert report.non_finite == EXPECTED


def test_a_float16_model_is_told_of_weights_beyond_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """BF16 in the files, float16 in the config: kept weights become infinite, and what codes stand for too."""
    tensors = read(checkpoint("llama"))
    tensors[NORM][7], tensors[Q_PROJ][2, 3], tensors[Q_PROJ][40, 50] = 70000.0, -1e5, 60000.0
    folder = write(tmp_path, checkpoint("llama"), [tensors])
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = load_quantized(folder, "quark_mxfp4")
    assert model.model.norm.weight[7] == math.inf
    decoded = model.model.layers[0].self_attn.q_proj.dequantize().half()
    assert decoded.isinf().nonzero().tolist() == [[2, 3], [40, 50]]
    assert model.load_report.non_finite == [
        NonFiniteReport(Q_PROJ, nan=0, infinite=0, overflowed=2, first=[2, 3]),
        NonFiniteReport(NORM, nan=0, infinite=0, overflowed=1, first=[7]),
    ]
    with pytest.raises(NonFiniteWeightError, match=r"is not finite at index"):
        load_quantized(folder, "quark_mxfp4", options=LoadOptions(strict=True))


def test_the_largest_float16_stays_finite_in_a_float16_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = read(checkpoint("llama_float16"))
    tensors[Q_PROJ][2, 3] = torch.finfo(torch.float16).max
    folder = write(tmp_path, checkpoint("llama_float16"), [tensors])
    for scheme in ("quark_mxfp4", "mxfp4_rows", "mxfp8", "fp8_per_tensor", "int4_per_group", "nvfp4"):
        model = load_quantized(folder, scheme, options=LoadOptions(strict=True))
        q_proj = model.model.layers[0].self_attn.q_proj
        assert model.dtype == torch.float16 or scheme.startswith("fp8")
        assert q_proj(torch.eye(q_proj.in_features, dtype=torch.float16)).isfinite().all(), scheme
        (layer,) = [layer for layer in model.load_report.layers if layer.name == Q_PROJ.removesuffix(".weight")]
        assert math.isfinite(layer.sqnr_db or math.nan)
        assert layer.amax == torch.finfo(torch.float16).max
