"""Modeling code sees the dtype it computes in and reads no codes: it gets the right numbers, or an error that helps."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture, logits, reference, save
from quantized_models import overwrite, relative_error
from quantload import QuantizationPolicy, load_quantized
from quantload.errors import QuantizedWeightError
from quantload.schemes.registry import ENTRIES
from torch import Tensor
from transformers import (
    LayoutLMv3Config,
    Lfm2VlConfig,
    PreTrainedModel,
    Siglip2Config,
    Swinv2Config,
    Wav2Vec2Config,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SCHEMES = ("quark_mxfp4", "fp8_per_channel", "int8_per_channel")


def _ids() -> Tensor:
    return torch.randint(8, 90, (2, 12), generator=torch.Generator().manual_seed(2))


def _patches() -> dict[str, Tensor]:
    """Two images of four patches of 4 x 4 pixels."""
    return {
        "pixel_values": torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(3)),
        "pixel_attention_mask": torch.ones(2, 4, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, 2], [2, 2]]),
    }


def _swinv2() -> Swinv2Config:
    return Swinv2Config(image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4)


def _siglip2() -> Siglip2Config:
    vision = {**SMALL, "patch_size": 4, "num_patches": 16}
    return Siglip2Config(text_config={**SMALL, "vocab_size": 96}, vision_config=vision, num_labels=3)


def _lfm2_vl() -> Lfm2VlConfig:
    text = {
        "model_type": "lfm2", **SMALL, "vocab_size": 96, "num_key_value_heads": 2, "block_dim": 32, "conv_dim": 32,
        "block_ff_dim": 64, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    vision = {"model_type": "siglip2_vision_model", **SMALL, "patch_size": 4, "num_patches": 16}
    return Lfm2VlConfig(
        text_config=text, vision_config=vision, image_token_id=95, downsample_factor=2, projector_hidden_size=32
    )


def _layoutlmv3() -> LayoutLMv3Config:
    return LayoutLMv3Config(
        **SMALL, vocab_size=96, coordinate_size=4, shape_size=8, visual_embed=False, max_position_embeddings=32,
        rel_pos_bins=32, rel_2d_pos_bins=64, num_labels=3,
    )  # fmt: skip


MODELS = {
    each.name: each
    for each in (
        Architecture("swinv2", "Swinv2ForImageClassification", _swinv2, lambda: {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        }),
        Architecture("siglip2", "Siglip2ForImageClassification", _siglip2, _patches),
        Architecture("lfm2_vl", "Lfm2VlForConditionalGeneration", _lfm2_vl, lambda: {"input_ids": _ids()}),
        Architecture("layoutlmv3", "LayoutLMv3ForTokenClassification", _layoutlmv3, lambda: {
            "input_ids": _ids(), "bbox": torch.tensor([3, 5, 30, 40]).expand(2, 12, 4).contiguous(),
        }),
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Architecture, Path]:
    model = MODELS[request.param]
    return model, save(model, tmp_path_factory.mktemp(model.name))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dtypes_buffers_and_answers_are_those_of_the_model_it_stands_for(
    saved: tuple[Architecture, Path], scheme: str
) -> None:
    architecture, path = saved
    quantized, plain = load_quantized(path, scheme), reference(path, architecture)
    assert len(quantized.load_report.layers) > 8
    assert quantized.dtype == plain.dtype == torch.bfloat16
    ours = dict(quantized.named_modules())
    for name, module in plain.named_modules():
        for recurse in (True, False):
            first = next(module.parameters(recurse=recurse), None)
            if first is not None:
                assert next(ours[name].parameters(recurse=recurse)).dtype == first.dtype, name
        if isinstance(module, PreTrainedModel):
            assert ours[name].dtype == module.dtype, name
    buffers = dict(quantized.named_buffers())
    for name, buffer in plain.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name
    want = logits(overwrite(plain, quantized), architecture.inputs())
    assert relative_error(logits(quantized, architecture.inputs()), want) < 0.02


def _wav2vec2() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        **SMALL, vocab_size=32, conv_dim=[32], conv_kernel=[4], conv_stride=[4], num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4, codevector_dim=32, proj_codevector_dim=32, num_codevectors_per_group=8,
    )  # fmt: skip


def test_a_class_that_asks_a_loaded_part_to_initialize_itself_keeps_its_weights(tmp_path: Path) -> None:
    """`_init_weights` of wav2vec2 calls `project_hid.reset_parameters()`."""
    model = Architecture("wav2vec2", "Wav2Vec2ForPreTraining", _wav2vec2, dict)
    quantized = load_quantized(save(model, tmp_path), "int8_per_channel")
    plain = reference(tmp_path, model)
    assert quantized.load_plan.parameters_quantized
    for name in ("project_hid", "project_q"):
        assert relative_error(quantized.get_submodule(name).dequantize(), plain.get_parameter(f"{name}.weight")) < 0.01
        assert torch.equal(quantized.get_parameter(f"{name}.bias"), plain.get_parameter(f"{name}.bias"))


def test_a_table_that_is_computed_after_loading_has_its_values(tmp_path: Path) -> None:
    """Cast to codes, -1.06 was 255."""
    save(MODELS["swinv2"], tmp_path)
    table = load_quantized(tmp_path).get_buffer("swinv2.encoder.layers.0.blocks.0.attention.self.relative_coords_table")
    assert table.dtype == torch.bfloat16
    assert float(table.min()) == -float(table.max()) == pytest.approx(-1.0567, abs=4e-3)


def test_layers_that_are_looked_up_are_kept_and_the_report_says_why(tmp_path: Path) -> None:
    save(MODELS["layoutlmv3"], tmp_path)
    kept = {each.name.rpartition(".")[2]: each.reason for each in load_quantized(tmp_path).load_report.kept}
    for name in ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"):
        assert kept[name] == "the forward of LayoutLMv3Encoder reads its weight instead of calling it"


# Code that comes with a checkpoint

CODE = """
import torch
from torch import nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "written_for_a_test"


def applied(x, layer):
    return x @ layer.weight.t()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(64, 64, bias=False)
        self.called = nn.Linear(64, 64, bias=False)

    def looked_up(self, x, layer):
        return F.linear(x, layer.weight)

    def forward(self, x):
        x = self.called(x)
        {use}


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.post_init()

    def forward(self, input_values):
        x = input_values
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=x)
"""

SEEN = {
    "direct": "return F.linear(x, self.read.weight)",
    "alias": "layer = self.read\nreturn x @ layer.weight.T",
    "weight": "w = self.read.weight\nreturn torch.matmul(x, w.t())",
    "method": "return self.looked_up(x, self.read)",
    "function": "return applied(x, layer=self.read)",
    "einsum": "return torch.einsum('bk,nk->bn', x, self.read.weight.data)",
    "norm": "return self.read(x) / self.read.weight.norm()",
}
"""What the load finds out."""
HIDDEN = {
    "by_name": "return F.linear(x, dict(self.named_parameters())['read.weight'])",
    "searched": "return x @ [m for n, m in self.named_modules() if n == 'read'][0].weight.t()",
    "first": "return F.linear(x, next(self.read.parameters()))",
    "detached": "return x * vars(self)['_modules']['read'].weight.detach().mean()",
}
"""What it does not."""
ASKED = {
    "dtype": "return self.read(x.float().to(self.read.weight.dtype))",
    "parameters": "return self.read(x.float().to(next(self.parameters()).dtype))",
    "like": "return self.read(x.float().to(self.read.weight) + self.read.weight.new_zeros(1))",
    "deep_dtype": "layer = self.read\nreturn layer(x.float().type_as(layer.weight))",
}

Remote = Callable[[str], Path]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A checkpoint whose own code has `use` in its forward."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the folder of modules is put there

    def written(use: str) -> Path:
        from safetensors.torch import save_file

        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "modeling_own.py").write_text(CODE.replace("{use}", textwrap.indent(use, " " * 8).lstrip()))
        names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
        config = {
            "model_type": "written_for_a_test", "architectures": ["OwnModel"], "auto_map": names, "dtype": "bfloat16",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(5)
        save_file(
            {
                f"blocks.{i}.{name}.weight": torch.randn(64, 64, generator=generator).div(8).bfloat16()
                for i in range(2)
                for name in ("read", "called")
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        return folder

    return written


def answer(model: Any) -> Tensor:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        out: Tensor = model(x).logits
    return out


def check_remote(path: Path, kind: str, scheme: str) -> None:
    from transformers import AutoModel

    model = load_quantized(path, scheme, trust_remote_code=True)
    quantized = {layer.name for layer in model.load_report.layers}
    called = {"blocks.0.called", "blocks.1.called"}
    if kind == "hidden":
        assert quantized == called | {"blocks.0.read", "blocks.1.read"}
        with pytest.raises(QuantizedWeightError, match=r"^blocks\.0\.read\.weight .*--ignore 'blocks\.\*\.read'"):
            answer(model)
        policy = QuantizationPolicy(ignore=("blocks.*.read",))
        model = load_quantized(path, scheme, policy=policy, trust_remote_code=True)
        quantized = {layer.name for layer in model.load_report.layers}
    assert quantized == (called | {"blocks.0.read", "blocks.1.read"} if kind == "asked" else called)
    plain = AutoModel.from_pretrained(path, dtype="auto", trust_remote_code=True)
    got = answer(model)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, answer(overwrite(plain, model))) < 0.02


USES = [(kind, use) for kind, uses in (("seen", SEEN), ("hidden", HIDDEN), ("asked", ASKED)) for use in uses]
ALL = {**SEEN, **HIDDEN, **ASKED}


@pytest.mark.parametrize(("kind", "use"), USES)
def test_code_of_a_checkpoint_gets_numbers_or_an_error(kind: str, use: str, remote: Remote) -> None:
    check_remote(remote(ALL[use]), kind, "int8_per_channel" if kind == "seen" else "fp8_per_channel")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [entry.name for entry in ENTRIES if entry.linear is not None])
@pytest.mark.parametrize(("kind", "use"), USES)
def test_code_of_a_checkpoint_gets_numbers_or_an_error_in_every_scheme(
    kind: str, use: str, scheme: str, remote: Remote
) -> None:
    check_remote(remote(ALL[use]), kind, scheme)
