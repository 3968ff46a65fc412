"""Where a checkpoint says how it is quantized: each place that a tool has for it, and what stands in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantload.checkpoint.resolve import resolve
from quantload.errors import CheckpointError, UnsupportedCheckpointError

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
OTHER = {"quant_method": "awq", "bits": 4}
MIXED = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"q": {"quant_algo": "FP8"}}}


def config(folder: Path, said: dict[str, Any], **files: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config is taken for, with other files beside it."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **said}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return resolve(folder).config()


@pytest.mark.parametrize(
    "said",
    [
        {"quantization_config": FP8},
        {"text_config": {"quantization_config": FP8, "hidden_size": 8}},
        {"thinker_config": {"text_config": {"quantization_config": FP8}}},
        {"llm_config": {"quantization_config": FP8}, "vision_config": {"quantization_config": None}},
        {"text_config": {"quantization_config": FP8}, "audio_config": {"quantization_config": FP8}},
        {"quantization_config": FP8, "text_config": {"quantization_config": OTHER}},  # as transformers takes it
        {"quantization_config": None, "text_config": {"quantization_config": FP8}},
        {"quantization_config": FP8, "compression_config": OTHER},
    ],
)
def test_it_is_found_and_stands_nowhere_else(said: dict[str, Any], tmp_path: Path) -> None:
    found = config(tmp_path, said)
    assert found.pop("quantization_config") == FP8
    assert "quant_method" not in json.dumps(found)
    assert found["model_type"] == "llama"
    assert ("text_config" in said) == ("text_config" in found)


@pytest.mark.parametrize("said", [{}, {"quantization_config": None}, {"text_config": {"quantization_config": None}}])
def test_none_at_all(said: dict[str, Any], tmp_path: Path) -> None:
    assert config(tmp_path, said).get("quantization_config") is None
    assert not resolve(tmp_path).is_quantized


def test_parts_that_differ_are_refused(tmp_path: Path) -> None:
    said = {"text_config": {"quantization_config": FP8}, "vision_config": {"quantization_config": OTHER}}
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"text_config\.quantization_config and vision_config\.quantization_config differ",
    ):
        config(tmp_path, said)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"config_groups": {}, "format": "dense"}, {"config_groups": {}, "format": "dense"}),
        ({"quantization_config": {"format": "dense"}, "sparsity_config": {"format": "sparse"}},
         {"format": "dense", "sparsity_config": {"format": "sparse"}}),
        ({"quant_method": "sparseml"}, {"quant_method": "sparseml"}),
    ],
)  # fmt: skip
def test_compression_config(said: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    found = config(tmp_path, {"compression_config": said})
    assert found["quantization_config"] == {"quant_method": "compressed-tensors", **wanted}
    assert "compression_config" not in found


GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("hf_quant_config", {"quantization": {"quant_algo": "FP8"}},
         {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}),
        ("quantize_config", GPTQ, {"quant_method": "gptq", **GPTQ}),
        ("quantize_config", AWQ,
         {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}),
        ("quant_config", AWQ,
         {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}),
        ("quant_config", {"quant_method": "awq", "bits": 4}, {"quant_method": "awq", "bits": 4}),
        ("quant_config", {"backend": "of another tool"}, None),
        ("quantize_config", {"optimizer": "of another tool"}, None),
    ],
)  # fmt: skip
def test_files_of_their_own(name: str, content: dict[str, Any], wanted: dict[str, Any] | None, tmp_path: Path) -> None:
    assert config(tmp_path, {}, **{name: content}).get("quantization_config") == wanted
    assert config(tmp_path, {"quantization_config": FP8})["quantization_config"] == FP8


def test_the_layers_of_mixed_precision_may_stand_in_the_file_only(tmp_path: Path) -> None:
    said = {"quant_method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION"}
    found = config(tmp_path, {"quantization_config": said}, hf_quant_config={"quantization": MIXED})
    assert found["quantization_config"] == {"quant_method": "modelopt_mixed", "quantization": MIXED}
    whole = {"quant_method": "modelopt_mixed", **MIXED}
    assert config(tmp_path, {"quantization_config": whole})["quantization_config"] == whole


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_anything_but_an_object_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is a list, expected a JSON object"):
        config(tmp_path, {field: [FP8]})
