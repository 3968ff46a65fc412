"""What is written reads back to an online load, byte for byte, and by its own config: every pair there is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import pytest
import stored_tensors
import torch
from quantload import LoadOptions, QuantizationPolicy, QuantloadConfig, convert_checkpoint, load_quantized
from quantload.errors import NonFiniteWeightError, PolicyError
from quantload.geometry.layout import WeightLayout
from quantload.kernels.formats import FORMATS
from quantload.schemes.exported.own import quantization_config
from quantload.schemes.exported.registry import formats_of
from quantload.schemes.exported.weights import NamedModules
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TOOLS = ("quark", "compressed-tensors")
OWN = "quantload"
QUICK = "nl4", "mxfp4_rows", "quark_int4fp8_moe"
"""Schemes that only quantload's own form holds; it holds the others in the same way."""
PAIRS = [
    pytest.param(entry.name, name, marks=[pytest.mark.slow] if name == OWN and entry.name not in QUICK else [])
    for entry in ENTRIES
    for name in formats_of(entry)
]
LINEAR_PAIRS = [pair for pair in PAIRS if pair.values[0] != "experts_int8"]
# The experts of the tiny model have fewer columns than a group of INT4 weights.
MOE_PAIRS = [pair for pair in PAIRS if pair.values[0] != "int4_per_group" or pair.values[1] == OWN]


def described(folder: Path) -> tuple[set[str], dict[str, Any]]:
    """The quantized weights as the config has them, and what the config says of quantization."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    stored = stored_tensors.read(config["quantization_config"], tensors, dtype=config["dtype"])
    assert not stored.unused
    return set(stored.weights), config["quantization_config"]


def quantized(model: Any) -> set[str]:
    """The names in a checkpoint of the weights a loaded model has quantized."""
    names: set[str] = set()
    for name, module in model.named_modules():
        if hasattr(module, "weight_layout"):
            names.add(f"{name}.weight")
        elif hasattr(module, "weight_layouts"):
            each = itertools.product(range(module.num_experts), ("gate", "up", "down"))
            names |= {f"{name}.{expert}.{part}_proj.weight" for expert, part in each}
    return names


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert got
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(got[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def check(original: Path, out: Path, scheme: str, form: str, policy: QuantizationPolicy | None = None) -> list[str]:
    """Convert, compare with an online load; the modules the config says are kept."""
    report = convert_checkpoint(original, out, scheme, format=form, policy=policy)
    online = load_quantized(original, scheme, policy=policy)
    weights, config = described(out)
    assert weights == quantized(online)
    assert config["quant_method"] == form
    assert_same(load_quantized(out).state_dict(), online.state_dict())
    if form == OWN:
        assert {OWN} == {config["quant_method"], *report.read_by}
        return []
    kept: list[str] = config["exclude" if form == "quark" else "ignore"]
    return kept


@pytest.mark.parametrize(("scheme", "form"), LINEAR_PAIRS)
def test_a_dense_model_reads_back_to_an_online_load(scheme: str, form: str, golden: Path, tmp_path: Path) -> None:
    assert check(golden / "bf16_llama", tmp_path / "out", scheme, form) == (["lm_head"] if form != OWN else [])


@pytest.mark.parametrize(("scheme", "form"), MOE_PAIRS)
def test_experts_read_back_to_an_online_load(scheme: str, form: str, golden: Path, tmp_path: Path) -> None:
    kept = check(golden / "bf16_qwen3moe", tmp_path / "out", scheme, form)
    assert form == OWN or {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"} <= set(kept)


@pytest.mark.parametrize("scheme", ["nl4", "mxfp4_rows"])
@pytest.mark.parametrize("name", ["llama_odd", "qwen3_moe_odd"])
def test_any_number_of_columns_is_written_in_the_own_form(
    name: str, scheme: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    check(checkpoint(name), tmp_path / "out", scheme, OWN)
    small = LoadOptions(chunk_bytes=4096)
    online = load_quantized(checkpoint(name), scheme)
    assert_same(load_quantized(tmp_path / "out", options=small).state_dict(), online.state_dict())
    again = load_quantized(tmp_path / "out", "int8_per_channel", options=small)
    whole = load_quantized(tmp_path / "out", "int8_per_channel")
    assert {module.scheme.name for module in again.modules() if hasattr(module, "scheme")} == {"int8_per_channel"}
    assert_same(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("where", "value"), [(-1, 0x7F), (0, 0xFF)], ids=["multiplier", "scale"])
def test_damaged_scales_of_rows_with_multipliers_are_named(
    where: int, value: int, golden: Path, tmp_path: Path
) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "mxfp4_rows", format=OWN)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][3, where] = value  # the last byte of an infinite number or NaN
    tensors["model.layers.1.mlp.down_proj.weight_scale"][3, where - 1] |= 0x80 * (where < 0)
    save_file(tensors, file, {"format": "pt"})
    for scheme in ("auto", "int8_per_channel"):
        with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.down_proj.*scale"):
            load_quantized(tmp_path / "out", scheme)


def test_transformers_opens_the_own_form_with_quantload(golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", "nl4", format=OWN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.config.quantization_config, QuantloadConfig)  # whose import makes the method known
    assert_same(model.state_dict(), load_quantized(golden / "bf16_qwen3moe", "nl4").state_dict())


def test_experts_that_are_alike_are_said_once_and_others_one_by_one(golden: Path, tmp_path: Path) -> None:
    policy = QuantizationPolicy(overrides=(("*.1.mlp.experts", "fp8_per_channel"),))
    check(golden / "bf16_qwen3moe", tmp_path / "out", "nl4", OWN, policy)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["formats"]["model.layers.0.mlp.experts.*.up_proj.weight"] == "nl4"
    assert config["formats"]["model.layers.1.mlp.experts.*.up_proj.weight"] == "fp8_channel"
    assert config["shapes"].keys() == config["formats"].keys()
    assert not any(".experts.0." in name for name in config["formats"])
    layout = WeightLayout(FORMATS["nl4"], None, (("", 8),), 64)
    weights = {f"a.experts.{expert}.up_proj.weight": layout for expert in (0, 2)}
    said = quantization_config(NamedModules(kept=["a.experts.1.up_proj", "b"], weights=weights))
    assert said["formats"] == dict.fromkeys(weights, "nl4")
    assert said["shapes"] == {name: [None, 8, 64] for name in weights}


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"])
@pytest.mark.parametrize("name", ["llama_odd", "qwen3_moe_odd"])
def test_blocks_that_are_not_full_read_back_as_quark_has_them(
    name: str, scheme: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """K = 80, 112, 48, 40: scales of the last blocks, and no codes of what would fill them up."""
    check(checkpoint(name), tmp_path / "out", scheme, "quark")
    written, whole = load_file(tmp_path / "out/model.safetensors"), load_file(checkpoint(name) / "model.safetensors")
    codes = [tensor for tensor in written if f"{tensor}_scale" in written]
    assert codes
    bits = 4 if scheme == "quark_mxfp4" else 6
    for tensor in codes:
        rows, columns = whole[tensor].shape
        assert written[tensor].shape == (rows, columns * bits // 8)
        assert written[f"{tensor}_scale"].shape == (rows, -(-columns // 32))
    again = load_quantized(tmp_path / "out", "int8_per_channel", options=LoadOptions(chunk_bytes=4096))
    module = next(module for module in again.modules() if hasattr(module, "scheme"))
    assert module.scheme.name == "int8_per_channel"


def test_columns_that_do_not_fill_a_byte(tmp_path: Path) -> None:
    odd = architectures.BY_NAME["llama_odd"]
    config = odd.config()
    config.intermediate_size = 111
    architectures.save(dataclasses.replace(odd, config=lambda: config), tmp_path / "odd")
    with pytest.raises(
        PolicyError,
        match=r"2 modules .*model\.layers\.0\.mlp\.down_proj: .* has 111 columns, which are no multiple of 2, as quark "
        r"needs for quark_mxfp4 \(--format quantload holds them; quark holds them as fp8_per_tensor, fp8_per_channel, "
        r"int8_per_channel\); .*override",
    ):
        convert_checkpoint(tmp_path / "odd", tmp_path / "out", "quark_mxfp4")
    policy = QuantizationPolicy(overrides=(("*.down_proj", "fp8_per_channel"),))
    check(tmp_path / "odd", tmp_path / "out", "quark_mxfp4", "quark", policy)


@pytest.mark.parametrize("form", TOOLS)
def test_several_schemes_in_one_checkpoint(form: str, golden: Path, tmp_path: Path) -> None:
    policy = QuantizationPolicy(
        linear="fp8_per_channel", experts="quark_mxfp4", ignore=("*.k_proj",), overrides=(("*.1.*.q_proj", "none"),)
    )
    assert check(golden / "bf16_qwen3moe", tmp_path / "out", "auto", form, policy) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.gate",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]


@pytest.mark.parametrize("form", TOOLS)
def test_kept_experts_are_one_name(form: str, golden: Path, tmp_path: Path) -> None:
    policy = QuantizationPolicy(experts="none")
    kept = check(golden / "bf16_qwen3moe", tmp_path / "out", "auto", form, policy)
    named = [name for name in kept if "experts" in name]
    assert len(named) == 2 * 3 * (2 if form == "compressed-tensors" else 1)  # which names the first expert as well


@pytest.mark.parametrize(("form", "field"), [("quark", "exclude"), ("compressed-tensors", "ignore")])
def test_matrices_that_the_model_passes_over_are_kept_and_said_to_be(
    form: str, field: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The layer that predicts more tokens at once, which transformers does not build and other tools do."""
    source = Path(shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "source"))
    (shard,) = source.glob("*.safetensors")
    more = {
        "model.layers.61.eh_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.61.embed_tokens.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.61.mlp.experts.1.up_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.61.enorm.weight": torch.randn(32).bfloat16(),
    }
    save_file({**load_file(shard), **more}, shard, metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "out", "int8_per_channel", format=form)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    named = [name for name in config[field] if "61" in name]
    experts = {"quark": ["model.layers.61.mlp.experts.*.up_proj"]}
    of_each = r"re:model\.layers\.61\.mlp\.experts\.[0-9]+\.up_proj$"
    experts["compressed-tensors"] = [of_each, "model.layers.61.mlp.experts.0.up_proj"]
    assert named == ["model.layers.61.eh_proj", *experts[form]]
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in more.items())


NO_EXPERTS = "the model has no experts modules"


@pytest.mark.parametrize("form", [*TOOLS, "mxfp4"])
@pytest.mark.parametrize(
    ("scheme", "policy", "why"),
    [
        ("experts_int8", None, rf"{NO_EXPERTS}; linear layers: experts_int8 leaves linear layers as stored \(14\); "),
        ("none", None, rf"{NO_EXPERTS}; linear layers: none leaves linear layers as stored \(14\); "),
        ("quark_mxfp4", QuantizationPolicy(ignore=("*",)), r"linear layers: ignored by pattern '\*' \(15\)"),
        ("quark_mxfp4", QuantizationPolicy(ignore=("*_proj",)), r"pattern '\*_proj' \(14\); .*: output head \(1\)"),
    ],
    ids=["experts of a dense model", "none", "everything ignored", "the rest ignored"],
)
def test_nothing_to_quantize_is_refused(
    scheme: str, policy: QuantizationPolicy | None, why: str, form: str, golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        PolicyError, match=rf"^no module would be quantized, .*{why}.*; choose a scheme .*\(-q, .* ignore less"
    ):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", scheme, format=form, policy=policy)
    assert not list(tmp_path.iterdir())


GPT_OSS = QuantizationPolicy(linear="none", experts="quark_mxfp4")


@pytest.mark.parametrize("options", [LoadOptions(), LoadOptions(chunk_bytes=4096, workers=3)], ids=["whole", "pieces"])
def test_gpt_oss_in_its_own_layout(options: LoadOptions, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    convert_checkpoint(checkpoint("gpt_oss"), tmp_path / "out", policy=GPT_OSS, format="mxfp4", options=options)
    weights, config = described(tmp_path / "out")
    online = load_quantized(checkpoint("gpt_oss"), policy=GPT_OSS)
    assert len(weights) == 4
    assert config["quant_method"] == "mxfp4"
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.router", "lm_head"} <= set(
        config["modules_to_not_convert"]
    )
    assert_same(load_quantized(tmp_path / "out").state_dict(), online.state_dict())
    blocks = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.experts.down_proj_blocks"]
    experts = online.get_submodule("model.layers.0.mlp.experts")
    assert torch.equal(blocks.flatten(2), experts.state_dict()["down_proj"])
    assert blocks.shape[-1] == 16


@pytest.mark.parametrize(
    ("name", "form", "policy", "why"),
    [
        ("gpt_oss", "quark", None, r"2 modules .* holds all experts of a layer, which only the format mxfp4 has"),
        ("gpt_oss", "mxfp4", None, r"8 modules .* is not the weight of all experts of a layer as gpt-oss stores it"),
        ("gpt_oss_odd", "mxfp4", GPT_OSS, r"2 modules .* has 40 columns, which are no multiple of 32"),
        ("llama4_text", "mxfp4", GPT_OSS, r"1 modules .* is not the weight of all experts"),
        ("gpt2", "quark", None, r"8 modules .*c_attn\.weight \[64, 192\] is stored transposed"),
        (
            "llama_odd",
            "compressed-tensors",
            None,
            r"14 modules .* has 80 columns, which are no multiple of 32, as compressed-tensors needs for quark_mxfp4 "
            r"\(--format quark holds them; compressed-tensors holds them as fp8_per_tensor, ",
        ),
    ],
)
def test_every_module_that_cannot_be_written_is_named(
    name: str,
    form: str,
    policy: QuantizationPolicy | None,
    why: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(PolicyError, match=why):
        convert_checkpoint(checkpoint(name), tmp_path / "out", policy=policy, format=form)
    assert not list(tmp_path.iterdir())


def test_a_scale_for_several_tensors_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="is scaled together with other tensors, or in parts, by fp8_per_tensor"):
        convert_checkpoint(checkpoint("nomic_bert"), tmp_path / "out", "fp8_per_tensor")


def test_another_rule_for_scales_gives_other_bytes(golden: Path, tmp_path: Path) -> None:
    check(golden / "bf16_llama", tmp_path / "out", "quark_mxfp4", "quark", QuantizationPolicy(scale_mode="mse"))
    convert_checkpoint(golden / "bf16_llama", tmp_path / "plain", "quark_mxfp4")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert files[0] != files[1]


def test_a_pair_that_does_not_exist_names_those_that_do(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError,
        match=r"mxfp6_e3m2 cannot be written as compressed-tensors, .*; there are: quark: quark_mxfp4, .*; "
        r"compressed-tensors: quark_mxfp4, mxfp6_e2m3, mxfp8, ",
    ):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "mxfp6_e3m2", format="compressed-tensors")
    for form in ("quark", "compressed-tensors", "mxfp4"):  # none has a place for multipliers of rows
        with pytest.raises(PolicyError, match=f"mxfp4_rows cannot be written as {form}, which has no such weights"):
            convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "mxfp4_rows", format=form)
    with pytest.raises(
        PolicyError, match=r"ptpc_fp8 \(fp8_per_channel\) cannot be written as mxfp4, which has no such"
    ):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "ptpc_fp8", format="mxfp4")
    with pytest.raises(PolicyError, match="format is 'gguf'; choose one of quark, compressed-tensors, mxfp4"):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())
