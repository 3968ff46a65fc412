"""compressed-tensors itself, and transformers with it, read what is written as `compressed-tensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import renamed_reads
import torch
from quantload import LoadOptions, convert_checkpoint, load_quantized
from quantload.schemes.exported.registry import formats_of
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.compat
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

SCHEMES = [entry.name for entry in ENTRIES if "compressed-tensors" in formats_of(entry) and entry.linear is not None]
MX = ("quark_mxfp4", "mxfp6_e2m3", "mxfp8")
IDS = torch.arange(1, 20).view(1, -1)


@pytest.fixture(scope="module", params=SCHEMES)
def converted(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / str(request.param)
    convert_checkpoint(golden / "bf16_llama", out, request.param, format="compressed-tensors")
    return out


def decompressed(tensors: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    weight: Tensor = BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]
    return weight


def test_its_config_is_accepted(converted: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    written = json.loads((converted / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    assert config.ignore == ["lm_head"]
    assert config.format == written["format"]


def test_it_decompresses_to_the_values_we_load(converted: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    written = json.loads((converted / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(written).config_groups.values()
    tensors, model = load_file(converted / "model.safetensors"), load_quantized(converted)
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "scheme")}
    assert len(modules) == 14
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        got, want = decompressed(own, scheme), module.dequantize()
        # It multiplies in the dtype of the scale: BF16 for powers of two, FP16 for INT4, else float32 as we do.
        # Of NVFP4 it divides scales by the multiplier, we multiply by its inverse: another last bit in float32.
        if converted.name == "nvfp4":
            torch.testing.assert_close(got.float(), want, rtol=2.0**-8, atol=0)
        else:
            assert torch.equal(got.float(), want.to(got.dtype).float()), name


def test_transformers_opens_it(converted: Path) -> None:
    if converted.name == "int4_per_group":
        pytest.skip("transformers and compressed-tensors 0.20 expect zero points of asymmetric weights unpacked")
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    theirs = logits(model)
    if converted.name in MX:
        # Its A16 formats keep activations as they are, MXFP4 rounds them; both to the last bit.
        options = LoadOptions(activations="emulate" if converted.name == "quark_mxfp4" else "none")
        assert torch.equal(theirs, logits(load_quantized(converted, options=options)))
    else:
        # It rounds FP8 and INT8 activations and, with the model's dtype, the scales.
        ours = logits(load_quantized(converted, options=LoadOptions(activations="none")))
        assert torch.linalg.norm(theirs - ours) < 0.1 * torch.linalg.norm(ours)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def test_nvfp4_is_what_it_compresses_itself(golden: Path, tmp_path: Path) -> None:
    """Its own scales and its own compressor, on the same BF16 weights; q, k, v and gate, up have one global scale."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    out = tmp_path / "out"
    convert_checkpoint(golden / "bf16_llama", out, "nvfp4", format="compressed-tensors")
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(written).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    got, original = load_file(out / "model.safetensors"), load_file(golden / "bf16_llama" / "model.safetensors")
    modules = [name.removesuffix(".weight_packed") for name in got if name.endswith(".weight_packed")]
    assert len(modules) == 14
    for name in modules:
        parent, _, own = name.rpartition(".")
        merged = next(
            (group for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if own in group), (own,)
        )
        together = torch.cat([original[f"{parent}.{each}.weight"] for each in merged]).float()
        weight = original[f"{name}.weight"]
        global_scale = generate_gparam(together.amin().view(1), together.amax().view(1))
        blocks = weight.float().unflatten(1, (-1, 16))
        scale, zero_point = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale
        )
        tensors = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
        wanted = compressor.compress({**tensors, "weight_zero_point": zero_point}, scheme)
        for key in ("weight_packed", "weight_scale", "weight_global_scale"):
            ours, theirs = got[f"{name}.{key}"], wanted[key]
            assert ours.dtype == theirs.dtype, key
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8).view_as(ours.view(torch.uint8))), (
                name,
                key,
            )


FORMATS = ("quark_mxfp4", "fp8_per_channel")  # `weight_packed` and `weight`
# transformers 5.24 initializes these before it loads them, by the `weight` of their linear layers, packed or not.
INITIALIZED_BY_NAME = ("gemma3", "paligemma")


@pytest.mark.parametrize("policy", renamed_reads.POLICIES)
@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("name", renamed_reads.NAMES)
def test_modules_that_have_other_names_in_the_files(name: str, scheme: str, policy: str, tmp_path: Path) -> None:
    if name in INITIALIZED_BY_NAME and scheme == "quark_mxfp4" and policy != "towers kept":
        pytest.skip("transformers does not open packed weights of SigLIP's towers, whatever they are called")
    # transformers decodes experts, and rounds what goes into the linear layers beside them.
    exact = scheme == "quark_mxfp4" and policy != "several formats" and name != "mixtral"
    renamed_reads.check(name, scheme, "compressed-tensors", policy, tmp_path, read_back, exact=exact)


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES if scheme not in (*FORMATS, "int4_per_group", "nvfp4")]
)
def test_every_scheme_in_modules_that_have_other_names(scheme: str, tmp_path: Path) -> None:
    renamed_reads.check("llava", scheme, "compressed-tensors", "towers kept", tmp_path, read_back, exact=scheme in MX)


def read_back(module: Any) -> Tensor | None:
    scheme = getattr(module, "quantization_scheme", None)
    return None if scheme is None else decompressed(module.state_dict(), scheme)
