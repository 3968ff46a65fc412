"""What the door into SGLang says of names, hooks, gates and heads; nothing is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

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


def model_config(quantization: str | None, stored: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(quantization=quantization, _parse_quant_hf_config=lambda: stored)


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
def test_names_that_are_ours_here(methods: Any, asked: str | None, stored: Any, name: str) -> None:
    config = model_config(asked, stored)
    methods.verify(refuse, config)
    assert config.quantization == name
    from sglang.srt.layers.quantization import get_quantization_config

    assert get_quantization_config(name).get_name() == name


@pytest.mark.parametrize(("asked", "stored"), [(None, None), ("fp8", None), (None, {"quant_method": "mxfp8"})])
def test_names_that_are_not_ours_are_left_to_sglang(methods: Any, asked: str | None, stored: Any) -> None:
    seen: list[Any] = []
    config = model_config(asked, stored)
    methods.verify(seen.append, config)
    assert seen == [config]
    assert config.quantization == asked


def test_what_sglang_runs_itself_is_left_to_it(methods: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.OWN, "quark_mxfp4", lambda: True)
    assert methods.ours("quark_mxfp4") is None
    assert methods.ours("quantload_quark_mxfp4") == "quantload_quark_mxfp4"


def test_a_quantized_checkpoint_is_refused(methods: Any) -> None:
    with pytest.raises(PolicyError, match=r"quantized already \(fp8\)"):
        methods.verify(refuse, model_config("quantload_mxfp8", {"quant_method": "fp8"}))


def test_hooks_that_were_not_applied_are_an_error(methods: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would go on without them, and only says so in its log."""
    methods.check_hooks()
    monkeypatch.setattr(HookRegistry, "_patched", set())
    with pytest.raises(PolicyError, match=r"has not put quantload's hook on sglang\.srt"):
        methods.verify(refuse, model_config("quantload_mxfp8"))


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
