"""Experts that a checkpoint stores in FP8, all of a layer in one tensor: kept, and quantized anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import raw_checkpoint
import torch
from quantload import LoadOptions, load_quantized
from quantload.errors import UnsupportedCheckpointError
from torch import Tensor

SMALL = LoadOptions(chunk_bytes=4096, workers=3)
Values = tuple[dict[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of a model under its own names, which has the experts of a layer in one tensor [E, N, K]."""
    qwen = architectures.BY_NAME["qwen3_moe"]
    config = qwen.config()
    config.hidden_size, config.moe_intermediate_size = 256, 128
    folder = architectures.save(replace(qwen, config=lambda: config), tmp_path_factory.mktemp("original") / "model")
    tensors: dict[str, Tensor] = load_quantized(folder, "none").state_dict()
    return {"folder": folder, **tensors}  # type: ignore[dict-item]


def blocks(name: str, weight: Tensor) -> Values:
    """A scale for 128 x 128 codes."""
    scale = weight.float().unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).abs().amax((2, 4)) / 448
    spread = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    return coded(name, weight, scale, spread)


def rows(name: str, weight: Tensor) -> Values:
    """A scale for each row."""
    scale = weight.float().abs().amax(2, keepdim=True) / 448
    return coded(name, weight, scale, scale)


def halves(name: str, weight: Tensor) -> Values:
    """One scale an expert, or two where gate and up are one tensor: what transformers has room for without blocks."""
    count = 2 if name.endswith("gate_up_proj") else 1
    scale = weight.float().unflatten(1, (count, -1)).abs().amax((2, 3))[..., None] / 448
    return coded(name, weight, scale, scale.repeat_interleave(weight.shape[1] // count, 1))


def coded(name: str, weight: Tensor, scale: Tensor, spread: Tensor) -> Values:
    codes = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * spread


KINDS: dict[str, tuple[Callable[[str, Tensor], Values], list[int] | None, str]] = {
    "blocks": (blocks, [128, 128], "fp8_block"),
    "rows": (rows, None, "fp8_channel"),
    "halves": (halves, None, "fp8_channel"),
}


def stored(folder: Path, original: dict[str, Any], kind: str) -> tuple[Path, Path, dict[str, Tensor]]:
    """The checkpoint with experts in FP8, the one with what they stand for in float32, and those values."""
    quantize, block, _ = KINDS[kind]
    tensors = {name: tensor for name, tensor in original.items() if name != "folder"}
    values: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if tensor.dim() == 3:
            parts, values[name] = quantize(name, tensor)
        quantized |= parts
    out = raw_checkpoint.write(folder / "quantized", original["folder"], [quantized])
    config = json.loads((out / "config.json").read_text())
    linears = ["self_attn", "lm_head", "mlp.gate"]
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block,
        "modules_to_not_convert": linears,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    plain = raw_checkpoint.write(folder / "plain", original["folder"], [tensors | values])
    return out, plain, values


@pytest.mark.parametrize("options", [LoadOptions(), SMALL], ids=["whole", "small pieces"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_as_stored(kind: str, options: LoadOptions, original: dict[str, Any], tmp_path: Path) -> None:
    folder, _, values = stored(tmp_path, original, kind)
    model = load_quantized(folder, options=options)
    report = model.load_report
    assert {(layer.kind, layer.scheme, layer.format) for layer in report.layers} == {
        ("experts", "prequantized", KINDS[kind][2])
    }
    assert report.final_bytes == report.predicted_final_bytes
    assert len(values) == 4
    for name, want in values.items():
        module, _, weight = name.rpartition(".")
        assert torch.equal(model.get_submodule(module).dequantize(weight), want), name
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_anew(kind: str, scheme: str, original: dict[str, Any], tmp_path: Path) -> None:
    folder, plain, values = stored(tmp_path, original, kind)
    got = load_quantized(folder, scheme, options=SMALL).state_dict()
    want = load_quantized(plain, scheme).state_dict()
    for name in values:
        for key in (name, f"{name}_scale"):
            assert torch.equal(got[key].view(torch.uint8), want[key].view(torch.uint8)), key


def test_experts_that_the_model_keeps_transposed_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = raw_checkpoint.read(checkpoint("gpt_oss"))
    for name in [name for name, tensor in tensors.items() if tensor.dim() == 3]:
        tensors |= rows(name, tensors[name])[0]
    folder = raw_checkpoint.write(tmp_path / "transposed", checkpoint("gpt_oss"), [tensors])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpointError, match=r"rows and columns exchanged"):
        load_quantized(folder, "int8_per_channel")
