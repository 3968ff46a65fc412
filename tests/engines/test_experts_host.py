"""Experts of an engine's layer, with its names, gates, biases and ids, compute what their codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantload.engines.experts_host import EngineExperts, Gate
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 64, 32, 6, 2
GPT_OSS = Gate(interleaved=True, limit=7.0, slope=1.702, shift=1.0)
BIASES = {"w13_weight": "w13_bias", "w2_weight": "w2_bias"}


def test_the_gate_of_gpt_oss_is_that_of_transformers() -> None:
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
    x = torch.linspace(-20, 20, 160).view(5, 32).to(torch.bfloat16)
    assert torch.equal(GPT_OSS(x), experts._apply_gate(x))


@pytest.mark.parametrize(
    ("gate", "want"),
    [
        (Gate(), lambda gate, up: F.silu(gate) * up),
        (Gate("gelu_tanh"), lambda gate, up: F.gelu(gate, approximate="tanh") * up),
        (Gate(limit=2.0), lambda gate, up: F.silu(gate.clamp(max=2)) * up.clamp(-2, 2)),
        (Gate(limit=2.0, bounds_activated=True), lambda gate, up: F.silu(gate).clamp(max=2) * up.clamp(-2, 2)),
    ],
)
def test_gates_by_their_formula(gate: Gate, want: Any) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(gate(x), want(*x.chunk(2, dim=-1)))
    assert gate.is_swiglu == (gate == Gate())


def test_an_activation_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="activation 'situ'; known are silu"):
        Gate("situ")
    with pytest.raises(ValueError, match="without a gate"):
        Gate("relu2", gated=False, limit=7.0)


def loaded(host: EngineExperts, scheme_name: str = "int8_per_channel") -> tuple[Any, dict[str, Tensor]]:
    """A layer with an engine's names, and the weights its codes stand for."""
    scheme: Any = SchemeFactory(torch.device("cpu"), LoadOptions()).experts(scheme_name)
    layer: Any = nn.Module()
    rows = (2 if host.gate.gated else 1) * INNER
    sizes: Any = {"w13_weight": (host.gate.shards(rows), HIDDEN), "w2_weight": ((("w2", HIDDEN),), INNER)}
    scheme.create_weights(layer, num_experts=EXPERTS, host=host, **sizes)
    layer.scheme = scheme
    generator = torch.Generator().manual_seed(1)
    loader = MoeOnlineWeightLoader(layer, scheme)
    for name, (shards, columns) in sizes.items():
        if name in host.biases:
            bias = torch.randn(EXPERTS, sum(n for _, n in shards), generator=generator)
            layer.register_parameter(host.biases[name], nn.Parameter(bias, requires_grad=False))
        for expert in range(EXPERTS):
            for shard, height in shards:
                weight = torch.randn(height, columns, generator=generator) * columns**-0.5
                loader.bound(name).load_shard(weight, shard, expert)
    return layer, {name: scheme.dequantize(layer, name) for name in sizes}


@pytest.mark.parametrize(
    "host",
    [
        EngineExperts(),
        EngineExperts(GPT_OSS, BIASES),
        EngineExperts(Gate("relu2", gated=False)),
        EngineExperts(weigh_input=True),
        EngineExperts(expert_map=lambda _: torch.tensor([-1, 2, -1, 0, 1, -1, 3, -1])),
    ],
    ids=["swiglu", "gpt-oss", "without a gate", "weighted input", "other ranks"],
)
def test_experts_compute_what_their_codes_stand_for(host: EngineExperts) -> None:
    layer, weights = loaded(host)
    generator = torch.Generator().manual_seed(2)
    x, router = torch.randn(TOKENS, HIDDEN, generator=generator), torch.rand(TOKENS, TOP_K, generator=generator)
    own = host.expert_map(layer)
    every = EXPERTS if own is None else len(own)
    ids = torch.stack([torch.randperm(every, generator=generator)[:TOP_K] for _ in range(TOKENS)]).int()
    want = torch.zeros_like(x)
    for token in range(TOKENS):
        for chosen, weight in zip(ids[token].tolist(), router[token], strict=True):
            expert = chosen if own is None else int(own[chosen])
            if expert < 0:
                continue
            biases = [layer._parameters[host.biases[n]][expert] if n in host.biases else None for n in weights]
            into = x[token] * weight if host.weigh_input else x[token]
            hidden = host.gate(F.linear(into, weights["w13_weight"][expert], biases[0]))
            out = F.linear(hidden, weights["w2_weight"][expert], biases[1])
            want[token] += out if host.weigh_input else out * weight
    got = layer.scheme.apply(layer, x, ids, router)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_which_layers_a_kernel_for_all_of_a_layer_may_serve() -> None:
    layer = nn.Module()
    assert EngineExperts().is_plain(layer)
    others = EngineExperts(biases=BIASES), EngineExperts(weigh_input=True), EngineExperts(Gate("gelu"))
    assert not any(host.is_plain(layer) for host in (*others, EngineExperts(expert_map=lambda _: torch.zeros(8))))
