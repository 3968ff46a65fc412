"""The calls to AMD's aiter, against a stand-in that refuses what aiter would refuse, and aiter's own layouts."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantload.kernels import aiter, mxfp4
from quantload.kernels.aiter import NotUsable
from quantload.kernels.formats import MXFP4
from quantload.kernels.gpu_matmul import gpu_matmuls
from quantload.kernels.gpu_target import GpuTarget
from quantload.kernels.registry import KernelSet, kernel_set
from quantload.schemes.activations import Activation, ActivationFormat
from quantload.schemes.base import Quantizer
from quantload.schemes.mxfp4 import QuarkMxfp4Linear, QuarkMxfp4MoE
from torch import Tensor, nn

GFX950 = GpuTarget("gfx950")
EMULATED = Activation(ActivationFormat("mxfp4", "group", 32), torch.device("cpu"))


@pytest.fixture(scope="module")
def layouts() -> dict[str, Tensor]:
    """What aiter's `shuffle_weight` and `e8m0_shuffle` made of random bytes."""
    with np.load(Path(__file__).parents[1] / "data" / "aiter_layouts.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(MXFP4.code_shape(*x.shape), dtype=torch.uint8)
    scales = torch.empty(MXFP4.scale_shape(*x.shape), dtype=torch.uint8)
    assert mxfp4.reference.quantize(x, codes, scales) == 0
    return codes, scales


def values(codes: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(codes.shape[0], codes.shape[1] * 2)
    mxfp4.reference.dequantize(codes, scales, out)
    return out


class StandIn:
    """Functions with aiter's signatures and its demands on shapes, types and layouts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def shuffle_weight(self, x: Tensor, layout: tuple[int, int] = (16, 16)) -> Tensor:
        assert layout == (16, 16)
        tiles = x.view(-1, x.shape[-2] // 16, 16, x.shape[-1] // 32, 2, 16)
        return tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)

    def e8m0_shuffle(self, scale: Tensor) -> Tensor:
        rows, columns = scale.shape
        padded = torch.full((-(-rows // 256) * 256, -(-columns // 8) * 8), 77, dtype=torch.uint8)
        padded[:rows, :columns] = scale
        tiles = padded.view(padded.shape[0] // 32, 2, 16, padded.shape[1] // 8, 2, 4)
        return tiles.permute(0, 3, 5, 2, 4, 1).contiguous().view(padded.shape)

    def dynamic_mxfp4_quant(self, x: Tensor, scaling_mode: str = "even") -> tuple[Tensor, Tensor]:
        codes, scales = quantize(x)
        return codes, scales.T.contiguous().T  # aiter's scales are column-major

    def gemm_a4w4(
        self,
        A: Tensor,
        B: Tensor,
        A_scale: Tensor,
        B_scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        bpreshuffle: bool = True,
    ) -> Tensor:
        self.calls.append("gemm_a4w4")
        assert A.dtype == B.dtype == torch.float4_e2m1fn_x2
        assert A_scale.dtype == B_scale.dtype == torch.float8_e8m0fnu
        assert bpreshuffle
        assert A_scale.shape[0] % 256 == B_scale.shape[0] % 256 == 0
        a = values(A.view(torch.uint8), aiter.unshuffle_scales(A_scale.view(torch.uint8))[: A.shape[0]])
        b = values(aiter.unshuffle_codes(B.view(torch.uint8)), aiter.unshuffle_scales(B_scale.view(torch.uint8)))
        return (a @ b.T).to(dtype)

    def gemm_a4w4_of_2025(
        self,
        A: Tensor,
        B: Tensor,
        A_scale: Tensor,
        B_scale: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        alpha: float | None = 1.0,
        beta: float | None = 0.0,
        bpreshuffle: bool | None = True,
    ) -> Tensor:
        assert out.shape[0] % 32 == 0
        assert out.dtype == torch.bfloat16
        out[: A.shape[0]] = self.gemm_a4w4(A, B, A_scale, B_scale)
        return out

    def fused_moe(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weight: Tensor,
        topk_ids: Tensor,
        expert_mask: Tensor | None = None,
        activation: Any = None,
        quant_type: Any = None,
        doweight_stage1: bool = False,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
    ) -> Tensor:
        self.calls.append("fused_moe")
        assert (activation, quant_type, doweight_stage1) == ("Silu", "per_1x32", False)
        assert topk_weight.dtype == torch.float32
        assert topk_ids.dtype == torch.int32
        assert w1.is_shuffled  # type: ignore[attr-defined]
        assert w2.is_shuffled  # type: ignore[attr-defined]
        out = torch.zeros(hidden_states.shape)
        for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weight, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = (self._one(hidden_states[token : token + 1], w1, w1_scale, expert)).chunk(2, -1)
                out[token] += weight * self._one((F.silu(gate) * up), w2, w2_scale, expert)[0]
        return out.to(hidden_states.dtype)

    def _one(self, x: Tensor, w: Tensor, scales: Any, expert: int) -> Tensor:
        codes, factors = (t[expert].view(torch.uint8) for t in (w, scales))
        weight = values(aiter.unshuffle_codes(codes), aiter.unshuffle_scales(factors))
        return (values(*quantize(x)) @ weight.T).to(x.dtype)

    def modules(self, gemm: str) -> dict[str, types.ModuleType]:
        kinds = types.SimpleNamespace(fp4x2=torch.float4_e2m1fn_x2, fp8_e8m0=torch.float8_e8m0fnu)
        contents: dict[str, dict[str, Any]] = {
            "aiter": {
                "gemm_a4w4": getattr(self, gemm),
                "dtypes": kinds,
                "ActivationType": types.SimpleNamespace(Silu="Silu"),
                "QuantType": types.SimpleNamespace(per_1x32="per_1x32"),
            },
            "aiter.ops": {},
            "aiter.ops.triton": {},
            "aiter.ops.triton.quant": {"dynamic_mxfp4_quant": self.dynamic_mxfp4_quant},
            "aiter.ops.shuffle": {"shuffle_weight": self.shuffle_weight},
            "aiter.utility": {},
            "aiter.utility.fp4_utils": {"e8m0_shuffle": self.e8m0_shuffle},
            "aiter.fused_moe": {"fused_moe": self.fused_moe},
        }
        made = {}
        for name, attributes in contents.items():
            made[name] = types.ModuleType(name)
            vars(made[name]).update(attributes, __path__=[])
        return made


@pytest.fixture
def forget() -> Iterator[None]:
    aiter.load.cache_clear()
    yield
    aiter.load.cache_clear()


@pytest.fixture(params=["gemm_a4w4", "gemm_a4w4_of_2025"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, forget: None) -> StandIn:
    torch.manual_seed(0)
    made = StandIn()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for name, module in made.modules(request.param).items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def through_aiter() -> KernelSet:
    """The kernels of the CPU, with aiter's of gfx950 for the matmuls."""
    plain = kernel_set("mxfp4", "cpu")
    functions = {op: gpu_matmuls(op, MXFP4)[0] for op in ("linear", "experts")}
    fields = {op: getattr(plain, op) for op in ("quantize", "observe", "finish_scales", "dequantize")}
    return KernelSet(
        MXFP4, **fields, **functions, names=plain.names, arrangements=dict.fromkeys(functions, aiter.ARRANGEMENT)
    )


def test_the_layouts_are_those_of_aiter(layouts: dict[str, Tensor]) -> None:
    assert torch.equal(aiter.unshuffle_codes(layouts["shuffle_weight|16x16"]), layouts["shuffle_weight|in"])
    assert torch.equal(aiter.unshuffle_scales(layouts["shuffle_scale|e8m0"]), layouts["shuffle_scale|in"])
    stand_in = StandIn()
    assert torch.equal(stand_in.shuffle_weight(layouts["shuffle_weight|in"]), layouts["shuffle_weight|16x16"])
    assert torch.equal(stand_in.e8m0_shuffle(layouts["shuffle_scale|in"]), layouts["shuffle_scale|e8m0"])


@pytest.mark.parametrize("chunk", [256, 4096])
def test_arranging_in_place_and_back(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(aiter, "CHUNK_ROWS", chunk)
    codes = torch.randint(0, 256, (3, 512, 256), dtype=torch.uint8)
    scales = torch.randint(0, 256, (3, 512, 16), dtype=torch.uint8)
    arranged = codes.clone(), scales.clone()
    aiter.arrange(*arranged, 512, 512)
    assert torch.equal(arranged[0], stand_in.shuffle_weight(codes).view(codes.shape))
    assert torch.equal(arranged[1][2], stand_in.e8m0_shuffle(scales[2]))
    back = aiter.canonical(*arranged, 512, 512)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)
    aiter.arrange(codes, scales, 500, 512)  # does not fit: not even looked at


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear(stand_in: StandIn, tokens: int, dtype: torch.dtype) -> None:
    scheme = QuarkMxfp4Linear(Quantizer(through_aiter()))
    layer: Any = nn.Module()
    scheme.create_weights(layer, in_features=512, out_features=256)
    codes, scales = quantize(torch.randn(256, 512) * 0.05)
    layer.weight, layer.weight_scale = (nn.Parameter(t.clone(), requires_grad=False) for t in (codes, scales))
    scheme.process_weights_after_loading(layer)
    assert not torch.equal(layer.weight, codes)
    assert torch.equal(scheme.dequantize(layer, "weight"), values(codes, scales))
    x, bias = torch.randn(2, tokens, 512).to(dtype), torch.randn(256).to(dtype)
    out = scheme.apply(layer, x, bias)
    want = values(*quantize(x.flatten(0, 1))) @ values(codes, scales).T + bias.float()
    assert (out.dtype, out.shape) == (dtype, (2, tokens, 256))
    torch.testing.assert_close(out.flatten(0, 1).float(), want, rtol=2e-2, atol=2e-2)
    assert stand_in.calls == ["gemm_a4w4"]


def test_a_weight_that_needs_padding_stays_canonical(stand_in: StandIn) -> None:
    seen = []
    linear = aiter.AiterLinear(lambda x, *rest: seen.append(rest) or x)  # type: ignore[func-returns-value]
    codes, scales = quantize(torch.randn(96, 512))
    kept = codes.clone(), scales.clone()
    aiter.arrange(codes, scales, 96, 512)
    assert torch.equal(codes, kept[0])
    linear(torch.randn(2, 512), codes, scales, None, 96, 512)
    assert len(seen) == 1
    assert stand_in.calls == []


class Experts(nn.Module):
    """A SwiGLU experts layer as transformers' interface describes them."""

    has_gate, has_bias, is_concatenated, is_transposed = True, False, True, False
    num_experts = 3

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def loaded(scheme: QuarkMxfp4MoE, layer: Any) -> dict[str, Tensor]:
    sizes = {"gate_up_proj": ((("w1", 256), ("w3", 256)), 512), "down_proj": ((("w2", 512),), 256)}
    scheme.create_weights(layer, num_experts=3, **sizes)
    weights = {}
    for name, layout in scheme.layouts(layer).items():
        pairs = [quantize(torch.randn(layout.rows, layout.columns) * 0.05) for _ in range(3)]
        for key, tensors in zip((name, f"{name}_scale"), zip(*pairs, strict=True), strict=True):
            layer._parameters[key] = nn.Parameter(torch.stack(tensors), requires_grad=False)
        weights[name] = torch.stack([values(*pair) for pair in pairs])
    return weights


def test_a_whole_experts_layer(stand_in: StandIn) -> None:
    scheme, layer = QuarkMxfp4MoE(Quantizer(through_aiter())), Experts()
    weights = loaded(scheme, layer)
    scheme.process_weights_after_loading(layer)
    for name, want in weights.items():
        assert torch.equal(scheme.dequantize(layer, name), want)
    x, ids = torch.randn(5, 512).bfloat16(), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    shares = torch.rand(5, 2)
    out = scheme.apply(layer, x, ids, shares)
    assert (out.dtype, out.shape) == (torch.bfloat16, x.shape)
    assert stand_in.calls == ["fused_moe"]

    plain, twin = QuarkMxfp4MoE(Quantizer(kernel_set("mxfp4", "cpu")), EMULATED), copy.deepcopy(layer)
    for name in weights:
        pair = aiter.canonical(
            layer._parameters[name],
            layer._parameters[f"{name}_scale"],
            *weights[name].shape[1:],  # type: ignore[arg-type]
        )
        twin._parameters |= dict(zip((name, f"{name}_scale"), pair, strict=True))
    plain.process_weights_after_loading(twin)
    want = plain.apply(twin, x, ids, shares)
    # a sum in another order may round to another BF16 in between, and that to another code
    assert float((out - want).float().norm() / want.float().norm()) < 0.02


@pytest.mark.parametrize("what", ["has_bias", "is_interleaved", "other_activation", "post_norm", "parallel"])
def test_what_is_no_plain_swiglu_is_not_fused(stand_in: StandIn, what: str) -> None:
    scheme, layer = QuarkMxfp4MoE(Quantizer(through_aiter())), Experts()
    loaded(scheme, layer)
    before = layer._parameters["gate_up_proj"].clone()  # type: ignore[union-attr]
    changes: dict[str, tuple[str, Any]] = {
        "has_bias": ("has_bias", True),
        "is_interleaved": ("is_concatenated", False),
        "other_activation": ("act_fn", nn.GELU()),
        "post_norm": ("has_post_expert_norm", True),
        "parallel": ("_is_expert_parallel", True),
    }
    setattr(layer, *changes[what])
    scheme.process_weights_after_loading(layer)
    assert torch.equal(layer._parameters["gate_up_proj"], before)  # type: ignore[arg-type]
    assert not layer.experts_are_fused


def test_only_on_rocm(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert aiter.why_not(GFX950) == "aiter is for ROCm, and this torch is not built for it"
    assert "this GPU is gfx942" in (aiter.why_not(GpuTarget("gfx942")) or "")


def test_not_installed(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert aiter.why_not(GFX950) == "AMD's aiter is not installed; get it from github.com/ROCm/aiter"


def test_the_asyncio_package_is_told_apart_and_not_imported(
    forget: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = aiter.why_not(GFX950) or ""
    assert "is not AMD's but the asyncio package of that name on PyPI" in reason
    assert str(tmp_path) in reason
    monkeypatch.setitem(sys.modules, "aiter", types.ModuleType("aiter"))
    with pytest.raises(NotUsable, match="not AMD's"):
        aiter.load()


def test_an_aiter_that_lacks_a_function_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["aiter.ops.shuffle"], "shuffle_weight")
    assert "shuffle_weight" in (aiter.why_not(GFX950) or "")


def test_usable(stand_in: StandIn) -> None:
    assert aiter.why_not(GFX950) is None
