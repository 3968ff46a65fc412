"""`bench/every_class.py`: the models it builds, and that it finds what it looks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import compared_models
import every_class
import pytest
import quantload
import shrunk_models
import torch
from transformers import PreTrainedModel

(LLAMA,) = shrunk_models.model_classes("^LlamaForCausalLM$")


@pytest.mark.slow  # imports every model of transformers
def test_every_class_of_the_auto_mappings_is_there_once() -> None:
    names = [each.class_name for each in shrunk_models.model_classes()]
    assert len(names) == len(set(names)) > 1000
    assert {"LlamaForCausalLM", "Swinv2Model", "LayoutLMv3Model", "T5ForConditionalGeneration"} <= {*names}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[PreTrainedModel, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("llama")
    shrunk_models.built(LLAMA, next(shrunk_models.shrunk_configs(LLAMA)), torch.float32).save_pretrained(folder)

    def loaded() -> tuple[PreTrainedModel, PreTrainedModel]:
        return quantload.load_quantized(folder, "int8_per_channel"), LLAMA.cls.from_pretrained(folder, dtype="auto")

    return loaded


def spoil_norm(model: PreTrainedModel) -> None:
    model.get_submodule("model.norm").weight.data[3] += 1e-6


def spoil_buffer(model: PreTrainedModel) -> None:
    rotary = model.get_submodule("model.rotary_emb")
    rotary.inv_freq = rotary.inv_freq.to(torch.int8)


def spoil_scale(model: PreTrainedModel) -> None:
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    apply = linear.forward
    linear.forward = lambda x: 2 * apply(x)  # what `dequantize` says is no longer what it computes


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (None, compared_models.RIGHT), (spoil_norm, "state differs"), (spoil_buffer, "state differs"),
        (spoil_scale, "values differ"),
    ],
)  # fmt: skip
def test_what_differs_is_found(
    spoil: Callable[[PreTrainedModel], None] | None,
    found: str,
    pair: Callable[[], tuple[PreTrainedModel, PreTrainedModel]],
) -> None:
    loaded, twin = pair()
    inputs = next(shrunk_models.candidate_inputs(twin))
    if spoil is not None:
        spoil(loaded)
    result, detail = compared_models.differs(loaded, twin, inputs)
    assert result == found, detail


@pytest.mark.slow
def test_a_run_keeps_a_row_for_each_class_scheme_and_dtype(tmp_path: Path) -> None:
    chosen = "^(LlamaForCausalLM|GPT2LMHeadModel|MixtralForCausalLM|T5ForConditionalGeneration|SiglipModel)$"
    schemes = ["quark_mxfp4", "fp8_per_channel", "int8_per_channel"]
    assert every_class.main(["--only", chosen, "--schemes", *schemes, "--out", str(tmp_path)]) == 0
    rows = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert len(rows) == 5 * len(schemes) * 2
    assert {row["result"] for row in rows} == {compared_models.RIGHT}, rows
