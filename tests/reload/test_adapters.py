"""LoRA adapters that are added to weights on their way: the model of a checkpoint that has them in its weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from new_weights import changed_copy, different, load
from quantload import reload_weights
from quantload.errors import MissingWeightsError, PolicyError, QuantloadError, UnsupportedCheckpointError
from quantload.reload.adapters import LoraAdapter
from safetensors.torch import save_file
from test_update import in_parts, passing, tensors_of
from torch import Tensor

Checkpoints = Callable[[str], Path]
RANK, ALPHA = 4, 6.0
MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.experts.1.up_proj",
    "model.layers.1.mlp.experts.2.down_proj",
]


def adapter_for(tensors: dict[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pairs: dict[str, Tensor] = {}
    for module in modules:
        rows, columns = tensors[f"{module}.weight"].shape
        pairs[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.1
        pairs[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
    return pairs


def merged(pairs: dict[str, Tensor], scale: float) -> Callable[[str, Tensor], Tensor]:
    def change(name: str, tensor: Tensor) -> Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in pairs:
            return tensor
        delta = pairs[f"{module}.lora_B.weight"] * scale @ pairs[f"{module}.lora_A.weight"]
        return (tensor.float() + delta).to(tensor.dtype)

    return change


def saved(folder: Path, pairs: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


SCHEMES = ["fp8_per_tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("quark_mxfp4", "none"))]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_is_merged_on_the_way(checkpoint: Checkpoints, tmp_path: Path, scheme: str) -> None:
    folder = checkpoint("qwen3_moe")
    tensors = tensors_of(folder)
    pairs = adapter_for(tensors, MODULES)
    model, fresh = (
        load(folder, scheme),
        load(changed_copy(folder, tmp_path / "new", merged(pairs, ALPHA / RANK)), scheme),
    )
    before = different(model, fresh)
    adapter = saved(tmp_path / "adapter", pairs)
    ways: list[Any] = [folder, tensors, passing(in_parts(tensors, random.Random(0)))]
    assert before
    for source in ways:
        reload_weights(model, source, adapter=adapter, progress=False)
        assert different(model, fresh) == []
        reload_weights(model, folder, progress=False)
        assert different(model, fresh) == before
    names = [f"{module}.weight" for module in MODULES]
    given = LoraAdapter.of({name.replace(".weight", ""): tensor for name, tensor in pairs.items()}, ALPHA)
    reload_weights(model, {name: tensors[name] for name in names}, partial=True, adapter=given)
    assert different(model, fresh) == []


def test_scales_of_peft(tmp_path: Path) -> None:
    pairs = {
        f"base_model.model.{name}.lora_{half}.weight": torch.ones(4, 4) for name in ("a.x", "b.y") for half in "AB"
    }
    assert LoraAdapter.read(saved(tmp_path / "plain", pairs)).scales == {"a.x": 1.5, "b.y": 1.5}
    assert LoraAdapter.read(saved(tmp_path / "rs", pairs, use_rslora=True)).scales == {"a.x": 3.0, "b.y": 3.0}
    patterned = saved(tmp_path / "patterned", pairs, alpha_pattern={"y": 12})
    assert LoraAdapter.read(patterned).scales == {"a.x": 1.5, "b.y": 3.0}
    several = saved(tmp_path / "several", pairs, alpha_pattern={"a.x": 12, ".*": 24})
    assert LoraAdapter.read(several).scales == {"a.x": 3.0, "b.y": 6.0}  # the first that fits
    without = saved(tmp_path / "without", pairs, lora_alpha=0, alpha_pattern={"y": 12})
    assert LoraAdapter.read(without).scales == {"a.x": 0.0, "b.y": 3.0}


@pytest.mark.parametrize(
    "field", [{"use_dora": True}, {"alora_invocation_tokens": [3, 4]}, {"layer_replication": [[0, 2], [1, 3]]}]
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, field: dict[str, Any]) -> None:
    pairs = {f"base_model.model.a.x.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    with pytest.raises(UnsupportedCheckpointError, match=f"{next(iter(field))}; only plain LoRA"):
        LoraAdapter.read(saved(tmp_path / "adapter", pairs, **field))


def test_an_adapter_to_other_weights_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    pairs = {f"base_model.model.a.x.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    for fits in (True, "gaussian", "eva"):
        assert LoraAdapter.read(saved(tmp_path / str(fits), pairs, init_lora_weights=fits)).scales == {"a.x": 1.5}
    with pytest.raises(UnsupportedCheckpointError, match="init_lora_weights is 'pissa_niter_4'"):
        LoraAdapter.read(saved(tmp_path / "pissa", pairs, init_lora_weights="pissa_niter_4"))


@pytest.mark.parametrize("module", ["attn.c_attn", "attn.c_proj"])  # one is square
def test_an_adapter_is_turned_where_a_kept_weight_is(checkpoint: Checkpoints, module: str) -> None:
    folder, name = checkpoint("gpt2"), f"transformer.h.0.{module}"
    model, before = load(folder, "none"), tensors_of(folder)[f"{name}.weight"]
    pairs = adapter_for({f"{name}.weight": before.T}, [name])
    reload_weights(model, folder, adapter=LoraAdapter.of(pairs, ALPHA), progress=False)
    a, b = pairs.values()
    expected = before.float() + (b * (ALPHA / RANK) @ a).T
    torch.testing.assert_close(model.state_dict()[f"{name}.weight"], expected.to(before.dtype))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda pairs: {"x.weight": torch.ones(2, 2)}, PolicyError, "no matrix of a LoRA adapter"),
        (lambda pairs: dict(list(pairs.items())[:1]), PolicyError, "only one matrix is given"),
        (lambda pairs: {n.replace("q_proj", "r_proj"): t for n, t in pairs.items()}, PolicyError, "could be added to"),
        (lambda pairs: {n: t[:, :3] for n, t in pairs.items()}, QuantloadError, "lora_A is"),
        (lambda pairs: {n: t if "_A" in n else t[:3] for n, t in pairs.items()}, QuantloadError, "B @ A is"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    checkpoint: Checkpoints, change: Callable[[Any], Any], error: type[QuantloadError], match: str
) -> None:
    model = load(checkpoint("qwen3_moe"))
    pairs = adapter_for(tensors_of(checkpoint("qwen3_moe")), MODULES[:1])
    with pytest.raises(error, match=match):
        reload_weights(model, {}, adapter=LoraAdapter.of(change(pairs), ALPHA), partial=True)
    with pytest.raises(MissingWeightsError, match=r"without the weights it is added to: .*q_proj"):
        reload_weights(model, {}, adapter=LoraAdapter.of(pairs, ALPHA), partial=True)
    assert model.load_report.state == "complete"
