"""Experts on codes compute what transformers' own experts compute on the weights those codes stand for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from quantload.model.experts import convert_experts, is_fused_experts, unsupported_reason
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

CPU = torch.device("cpu")
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 5, 64, 48, 2
SCHEMES = [
    "quark_mxfp4",
    "mxfp6_e2m3",
    "mxfp8",
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "int8_per_channel",
    "int4_per_group",
    "quark_int4fp8_moe",
]
KINDS: dict[str, dict[str, bool]] = {
    "gated": {},
    "without a gate": {"has_gate": False},
    "with biases": {"has_bias": True},
    "without a gate, with biases": {"has_gate": False, "has_bias": True},
    "transposed": {"is_transposed": True},
    "transposed, interleaved, biased": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "interleaved": {"is_concatenated": False},
}


class Config:
    _experts_implementation = "eager"


class Experts(nn.Module):
    """Fused experts as transformers' interface describes them."""

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        intermediate: int = INTERMEDIATE,
        *,
        kind: Mapping[str, bool] = KINDS["gated"],
    ) -> None:
        super().__init__()
        self.has_gate, self.has_bias = kind.get("has_gate", True), kind.get("has_bias", False)
        self.is_transposed, self.is_concatenated = kind.get("is_transposed", False), kind.get("is_concatenated", True)
        self.has_post_expert_norm = self._is_expert_parallel = False
        self.config: Any = Config()
        self.num_experts = EXPERTS
        self.act_fn = nn.SiLU()
        first = "gate_up_proj" if self.has_gate else "up_proj"
        rows = (2 if self.has_gate else 1) * intermediate
        self._add(first, rows, HIDDEN, dtype)
        self._add("down_proj", HIDDEN, intermediate, dtype)

    def _add(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows)
        shape = (EXPERTS, columns, rows) if self.is_transposed else (EXPERTS, rows, columns)
        weight = torch.randn(shape, generator=generator) * columns**-0.5
        self.register_parameter(name, nn.Parameter(weight.to(dtype), requires_grad=False))
        if self.has_bias:
            bias = torch.randn(EXPERTS, rows, generator=generator)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias.to(dtype), requires_grad=False))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        halves = gate_up.chunk(2, dim=-1) if self.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
        gated: Tensor = self.act_fn(halves[0]) * halves[1]
        return gated


def quantized(experts: Experts, scheme_name: str) -> tuple[Any, Experts]:
    """The experts on codes, and a twin that holds what the codes stand for."""
    scheme: Any = SchemeFactory(CPU, LoadOptions()).experts(scheme_name)
    module: Any = copy.deepcopy(experts)
    twin = copy.deepcopy(experts)
    weights = {name: p.data for name, p in experts.named_parameters() if p.dim() == 3}
    convert_experts(module, scheme)
    for name, layout in scheme.layouts(module).items():
        codes = torch.zeros(layout.shapes[0], dtype=layout.format.code_dtype)
        scales = torch.zeros(layout.shapes[1], dtype=layout.format.scale_dtype)
        for expert, weight in enumerate(weights[name]):
            matrix = (weight.T if experts.is_transposed else weight).contiguous()
            at = 0
            for low, high in zip(layout.shard_borders(), layout.shard_borders()[1:], strict=False):
                count = layout.format.scale_shape(high - low, layout.columns)[0]
                part = matrix[low:high]
                assert scheme.kernels.quantize(part, (codes[expert, low:high], scales[expert, at : at + count])) == 0
                at += count
        module._parameters[name] = nn.Parameter(codes, requires_grad=False)
        module._parameters[f"{name}_scale"] = nn.Parameter(scales, requires_grad=False)
        values = module.dequantize(name)
        assert values.shape == weights[name].shape
        twin.get_parameter(name).data.copy_(values)
    return module, twin


def routing(tokens: int, seed: int = 0, low: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS - low, generator=generator)[:TOP_K] + low for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return ids, weights / weights.sum(-1, keepdim=True)


def tokens(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers_on_the_dequantized_weights(kind: str, scheme: str) -> None:
    module, twin = quantized(Experts(kind=KINDS[kind]), scheme)
    x, (ids, weights) = tokens(17), routing(17)
    got = module.scheme.apply(module, x, ids, weights.to(x.dtype))
    want = grouped_mm_experts_forward(twin, x, ids, weights.to(x.dtype))
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert error(got, want) < 0.012  # both round to BF16 three times


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_gives_what_it_gives_transformers_experts(scheme: str, to: torch.dtype) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module, twin = quantized(Experts(dtype, kind=KINDS["with biases"]), scheme)
        ids, weights = routing(9)
        results = []
        for function in (lambda *given: module.scheme.apply(module, *given), functools.partial(batched, twin)):  # noqa: B023
            x = tokens(9, dtype).requires_grad_()
            with torch.autocast("cpu", dtype=to):
                out = function(x, ids, weights)
            out.float().square().sum().backward()
            assert x.grad is not None
            results.append((out.detach(), x.grad))
        (got, got_grad), (want, want_grad) = results
        assert got.dtype == want.dtype == got_grad.dtype == dtype
        assert error(got, want) < 0.02
        assert error(got_grad, want_grad) < 0.04


def batched(twin: Experts, *given: Tensor) -> Tensor:
    result: Tensor = batched_mm_experts_forward(twin, *given)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_float32_leaves_only_the_order_of_additions(kind: str) -> None:
    module, twin = quantized(Experts(torch.float32, kind=KINDS[kind]), "int8_per_channel")
    x, (ids, weights) = tokens(9, torch.float32), routing(9)
    want = batched_mm_experts_forward(twin, x, ids, weights)
    assert error(module.scheme.apply(module, x, ids, weights), want) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "biase" in kind])
def test_float32_biases_beside_bfloat16_activations(kind: str, scheme: str) -> None:
    """As engines hold them; transformers' own forward in float32 says what is right."""
    module, twin = quantized(Experts(kind=KINDS[kind]), scheme)
    twin = twin.float()
    for name in [name for name in module._parameters if name.endswith("_bias")]:
        bias = torch.randn(module.get_parameter(name).shape, generator=torch.Generator().manual_seed(5))
        for each in (module, twin):
            each._parameters[name] = nn.Parameter(bias.clone(), requires_grad=False)
    x, (ids, weights) = tokens(17), routing(17)
    got = module.scheme.apply(module, x, ids, weights)
    assert got.dtype == torch.bfloat16
    assert error(got, batched_mm_experts_forward(twin, x.float(), ids, weights)) < 0.012


@pytest.mark.parametrize("scheme", ["fp8_per_block", "fp8_per_tensor"])
def test_gate_and_up_that_share_no_scale_block(scheme: str) -> None:
    """130 rows each: the blocks of up do not begin at a multiple of 128 rows of the fused matrix."""
    module, twin = quantized(Experts(torch.float32, intermediate=130), scheme)
    x, (ids, weights) = tokens(9, torch.float32), routing(9)
    want = batched_mm_experts_forward(twin, x, ids, weights)
    assert error(module.scheme.apply(module, x, ids, weights), want) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_expert_nobody_was_routed_to_is_not_read(scheme: str) -> None:
    """NaN in their scales (which is 255 in E8M0) would show, even times zero."""
    module, twin = quantized(Experts(torch.float32), scheme)
    for name in ("gate_up_proj_scale", "down_proj_scale"):
        scales = module.get_parameter(name).data
        scales[:2] = 255 if scales.dtype == torch.uint8 else float("nan")
    x, (ids, weights) = tokens(6, torch.float32), routing(6, low=2)
    got = module.scheme.apply(module, x, ids, weights)
    assert error(got, batched_mm_experts_forward(twin, x, ids, weights)) < 1e-5


@pytest.mark.parametrize("no_expert", [EXPERTS, -1])
@pytest.mark.parametrize("everywhere", [False, True])
def test_ids_of_no_expert_mean_nobody(everywhere: bool, no_expert: int) -> None:
    """Expert parallelism marks tokens of other ranks so; whatever is in uninitialized memory must not come through."""
    module, twin = quantized(Experts(torch.float32), "int8_per_channel")
    x, (ids, weights) = tokens(6, torch.float32), routing(6)
    nobody = torch.ones_like(ids, dtype=torch.bool) if everywhere else torch.rand(ids.shape) < 0.5
    nobody[0] = True
    marked = ids.masked_fill(nobody, no_expert)
    got = module.scheme.apply(module, x, marked, weights)
    want = batched_mm_experts_forward(twin, x, ids, weights.masked_fill(nobody, 0.0))
    assert torch.isfinite(got).all()
    assert not got[0].any()
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_tokens() -> None:
    module, _ = quantized(Experts(), "quark_mxfp4")
    ids, weights = torch.empty(0, TOP_K, dtype=torch.int64), torch.empty(0, TOP_K)
    assert module.scheme.apply(module, tokens(0), ids, weights).shape == (0, HIDDEN)


def test_the_same_expert_twice_for_one_token() -> None:
    module, twin = quantized(Experts(torch.float32), "int8_per_channel")
    x, ids, weights = tokens(1, torch.float32), torch.tensor([[3, 3]]), torch.tensor([[0.25, 0.5]])
    assert error(module.scheme.apply(module, x, ids, weights), batched_mm_experts_forward(twin, x, ids, weights)) < 1e-5


def test_the_config_of_experts_kept_as_stored_is_left_alone() -> None:
    experts = Experts()
    shared = experts.config
    convert_experts(experts, SchemeFactory(CPU, LoadOptions()).experts("quark_mxfp4"))  # type: ignore[arg-type]
    assert experts.config is not shared
    assert experts.config._experts_implementation_internal == "quantload"
    assert not hasattr(shared, "_experts_implementation_internal")


def test_what_is_no_experts_module_and_what_cannot_be_converted() -> None:
    assert is_fused_experts(Experts())
    assert not is_fused_experts(nn.Linear(2, 2))
    assert unsupported_reason(Experts()) is None
    runs_itself = Experts()
    del runs_itself.config
    assert unsupported_reason(runs_itself) == (
        "Experts runs its experts itself, not through transformers' experts interface"
    )
    renamed = Experts()
    renamed.register_parameter("w13", renamed._parameters.pop("gate_up_proj"))
    assert unsupported_reason(renamed) == "Experts keeps its experts under names quantload does not know"
