"""What the door into SGLang says of names, hooks, gates and heads; nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

pytestmark = pytest.mark.sglang
sglang = pytest.importorskip("sglang.srt.plugins", reason="SGLang is not installed here")

from quantload.engines.experts_host import Gate  # noqa: E402
from quantload.engines.sglang import HOOKS, register  # noqa: E402
from quantload.engines.sglang_names import NAMES  # noqa: E402
from quantload.errors import PolicyError, UnsupportedCheckpointError  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()
    HookRegistry.apply_hooks()


@pytest.fixture
def methods() -> Any:
    from quantload.engines import sglang_methods

    return sglang_methods


@pytest.fixture
def verifying() -> Any:
    from quantload.engines import sglang_verify

    return sglang_verify


def model_config(quantization: str | None, stored: dict[str, Any] | None = None) -> Any:
    hf_config = PretrainedConfig(quantization_config=stored)
    return SimpleNamespace(quantization=quantization, hf_config=hf_config, _parse_quant_hf_config=lambda: stored)


def refuse(config: Any) -> None:
    raise AssertionError("this is for SGLang's own check")


def test_registering_again_adds_nothing() -> None:
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES

    before = list(QUANTIZATION_CHOICES), {target: len(HookRegistry._hooks[target]) for target in HOOKS}
    register()
    assert before == (list(QUANTIZATION_CHOICES), {target: len(HookRegistry._hooks[target]) for target in HOOKS})
    assert len(set(QUANTIZATION_CHOICES)) == len(QUANTIZATION_CHOICES)
    assert set(NAMES) <= set(QUANTIZATION_CHOICES)


@pytest.mark.parametrize(
    ("asked", "stored", "name"),
    [
        ("quantload_mxfp8", None, "quantload_mxfp8"),
        ("QUARK_MXFP4", None, "quantload_quark_mxfp4"),
        ("fp8_per_channel", None, "quantload_fp8_per_channel"),
        (None, {"quant_method": "quantload_nvfp4"}, "quantload_nvfp4"),
        ("nvfp4", {"quant_method": "nvfp4", "ignore": []}, "quantload_nvfp4"),
    ],
)
def test_names_that_are_ours_here(verifying: Any, asked: str | None, stored: Any, name: str) -> None:
    config = model_config(asked, stored)
    verifying.verify(refuse, config)
    assert config.quantization == name
    from sglang.srt.layers.quantization import get_quantization_config

    assert get_quantization_config(name).get_name() == name


@pytest.mark.parametrize(("asked", "stored"), [(None, None), ("fp8", None), (None, {"quant_method": "mxfp8"})])
def test_names_that_are_not_ours_are_left_to_sglang(verifying: Any, asked: str | None, stored: Any) -> None:
    seen: list[Any] = []
    config = model_config(asked, stored)
    verifying.verify(seen.append, config)
    assert seen == [config]
    assert config.quantization == asked


def test_what_sglang_runs_itself_is_left_to_it(verifying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verifying.OWN, "quark_mxfp4", lambda: True)
    assert verifying.ours("quark_mxfp4") is None
    assert verifying.ours("quantload_quark_mxfp4") == "quantload_quark_mxfp4"


STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}),
    "gptq": ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}),
    "fp8": ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp8": ("quantization_config", {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "quark": ("quantization_config", {"quant_method": "quark", "export": {}}),
    "mxfp4": ("quantization_config", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "compressed-tensors": ("compression_config", {"quant_method": "compressed-tensors", "config_groups": {}}),
    "modelopt": ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}),
}
"""By the names of tools: where a checkpoint says it, and what."""


def quantized(folder: Path, where: str, said: dict[str, Any]) -> str:
    """A folder with a config that says how the weights are stored."""
    from transformers import Qwen3Config

    described = Qwen3Config(architectures=["Qwen3ForCausalLM"], num_hidden_layers=1).to_dict()
    if where.endswith(".json"):
        (folder / where).write_text(json.dumps(said))
    else:
        described[where] = said
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.mark.parametrize("tool", sorted(STORED))
def test_a_quantized_checkpoint_is_decoded_where_one_of_our_schemes_is_asked_for(tool: str, tmp_path: Path) -> None:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.weight_utils import get_quant_config

    model = quantized(tmp_path, *STORED[tool])
    config = ModelConfig(model, quantization="quark_mxfp4")
    assert config.quantization == "quantload_quark_mxfp4"
    assert config.hf_config.quantization_config == {"quant_method": "quantload_quark_mxfp4", "decoded_from": tool}
    made = get_quant_config(config, LoadConfig(), {})
    assert (made.name, made.stored, made.policy.linear) == ("quantload_quark_mxfp4", tool, "quark_mxfp4")
    config._verify_quantization()  # again, in another process
    assert config.hf_config.quantization_config["decoded_from"] == tool
    assert ModelConfig(model).quantization not in NAMES  # theirs, where nothing is asked for


@pytest.mark.parametrize("method", ["bitsandbytes", "w8a8_int8", "auto-round"])
def test_a_checkpoint_that_is_not_read_here_is_refused(verifying: Any, method: str) -> None:
    with pytest.raises(PolicyError, match=f"quantized already, by {method}, which is not read here"):
        verifying.verify(refuse, model_config("quantload_mxfp8", {"quant_method": method}))


def test_options_are_not_taken_for_what_a_checkpoint_is_stored_in(methods: Any, verifying: Any) -> None:
    options = {"quant_method": "mxfp8", "ignore": ["*.o_proj"]}
    config = model_config("mxfp8", options)
    verifying.verify(refuse, config)
    assert config.hf_config.quantization_config == options
    assert methods.CLASSES["quantload_mxfp8"].from_config(options).stored is None


def test_only_formats_that_are_read_here_decode(methods: Any) -> None:
    for load_format in ("auto", "safetensors", "dummy"):
        methods._check_can_decode("awq", load_format)
    methods._check_can_decode(None, "npcache")
    with pytest.raises(PolicyError, match=r"already \(awq\), and only --load-format auto or safetensors decodes it"):
        methods._check_can_decode("awq", "npcache")


def test_hooks_that_were_not_applied_are_an_error(verifying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would go on without them, and only says so in its log."""
    verifying.check_hooks()
    monkeypatch.setattr(HookRegistry, "_patched", set())
    with pytest.raises(PolicyError, match=r"has not put quantload's hook on sglang\.srt"):
        verifying.verify(refuse, model_config("quantload_mxfp8"))


def runner(**fields: Any) -> Any:
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig

    return MoeRunnerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "gate"),
    [
        ({}, Gate()),
        ({"activation": "gelu"}, Gate("gelu")),
        ({"activation": "relu2", "is_gated": False}, Gate("relu2", gated=False)),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
            Gate(interleaved=True, limit=7.0, slope=1.702, shift=1.0),
        ),
        ({"gemm1_clamp_limit": 7.0}, Gate(limit=7.0, bounds_activated=True)),
        ({"swiglu_limit": 10.0}, Gate(limit=10.0)),
    ],
)
def test_gates_of_experts(methods: Any, fields: dict[str, Any], gate: Gate) -> None:
    assert methods.gate_of(runner(**fields), "model.layers.0.mlp.experts") == gate


def test_the_gate_of_gpt_oss_computes_what_sglang_computes(methods: Any) -> None:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    gate = methods.gate_of(runner(gemm1_alpha=1.702, gemm1_clamp_limit=7.0), "experts")
    x = torch.linspace(-20, 20, 64).view(2, 32)
    own = fused_moe.swiglu_gpt_oss_sigmoid_alpha
    torch.testing.assert_close(gate(x), getattr(own, "_torchdynamo_orig_callable", own)(x, 1.702, 7.0))


def test_an_unknown_gate_names_the_layer(methods: Any) -> None:
    with pytest.raises(PolicyError, match=r"layers\.3\.experts: .*'situ'.*ignore these experts"):
        methods.gate_of(runner(activation="situ"), "layers.3.experts")


class Tied(nn.Module):
    """A model with an embedding and a head, as SGLang makes them."""

    def __init__(self, shared: bool, text: bool = False) -> None:
        from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        super().__init__()
        config = SimpleNamespace(tie_word_embeddings=True)
        self.config = SimpleNamespace(text_config=config) if text else config
        weight = nn.Parameter(torch.zeros(4, 2))
        for name, kind in (("embed_tokens", VocabParallelEmbedding), ("lm_head", ParallelLMHead)):
            module = kind.__new__(kind)
            nn.Module.__init__(module)
            module.weight = weight if shared else nn.Parameter(torch.zeros(4, 2))
            self.add_module(name, module)


@pytest.mark.parametrize("text", [False, True])
def test_a_head_that_sglang_does_not_tie_is_refused(methods: Any, text: bool) -> None:
    from quantload.engines.sglang_loading import check_head

    with pytest.raises(UnsupportedCheckpointError, match=r"lm_head is tied .* SGLang's Tied does not tie it"):
        check_head(Tied(shared=False, text=text), {"embed_tokens.weight"})
    check_head(Tied(shared=False, text=text), {"embed_tokens.weight", "lm_head.weight"})
    check_head(Tied(shared=True, text=text), {"embed_tokens.weight"})
