"""The calls to AMD's aiter, against a stand-in that refuses what aiter would refuse, and aiter's own layouts."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantload import LoadOptions, load_quantized
from quantload.kernels import registry
from quantload.kernels.formats import MXFP4
from quantload.kernels.gpu import aiter
from quantload.kernels.gpu.aiter import NotUsable
from quantload.kernels.gpu.matmuls import gpu_matmuls
from quantload.kernels.gpu.target import GpuTarget
from quantload.kernels.reference import mxfp4
from quantload.kernels.registry import KernelSet, kernel_set
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.online.storage import FinalStorage
from quantload.schemes.activations import Activation, ActivationFormat
from quantload.schemes.base import Quantizer
from quantload.schemes.linear import QuantizedLinearScheme
from quantload.schemes.moe import QuantizedMoEScheme
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
    assert mxfp4.reference.quantize(x, (codes, scales)) == 0
    return codes, scales


def values(codes: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(codes.shape[0], codes.shape[1] * 2)
    mxfp4.reference.dequantize((codes, scales), out)
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
    functions: dict[str, Any] = {op: gpu_matmuls(op, MXFP4)[0] for op in ("linear", "experts")}
    fields: dict[str, Any] = {op: getattr(plain, op) for op in ("quantize", "observe", "finish_scales", "dequantize")}
    names = {**plain.names, **dict.fromkeys(functions, "aiter")}
    return KernelSet(
        MXFP4, **fields, **functions, names=names, arrangements=dict.fromkeys(functions, aiter.ARRANGEMENT)
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
    aiter.arrange(arranged)
    assert torch.equal(arranged[0], stand_in.shuffle_weight(codes).view(codes.shape))
    assert torch.equal(arranged[1][2], stand_in.e8m0_shuffle(scales[2]))
    back = aiter.canonical(arranged)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)


def inside(padded: Tensor, size: tuple[int, ...], fill: int = 99) -> Tensor:
    """A copy of `padded` on zeros, its last `size` in the corner, and `fill` where the padding is."""
    out = torch.full(size, fill, dtype=padded.dtype)
    out[..., : padded.shape[-2], : padded.shape[-1]] = padded
    return out


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize(("n_rows", "k"), [(256, 512), (100, 90), (257, 32), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear(stand_in: StandIn, tokens: int, n_rows: int, k: int, dtype: torch.dtype) -> None:
    scheme = QuantizedLinearScheme("quark_mxfp4", Quantizer(through_aiter()))
    layer: Any = nn.Module()
    scheme.create_weights(layer, shards=(("", n_rows),), in_features=k)
    rows, columns = aiter.padded(n_rows), aiter.padded(k)
    assert layer.weight.shape == (rows, columns // 2)
    assert layer.weight_scale.shape == (rows, columns // 32)
    weight = torch.randn(n_rows, k) * 0.05
    codes, scales = quantize(weight)
    expected = inside(codes, (rows, columns // 2), 0), inside(scales, (rows, columns // 32), 0)
    want_weight = values(codes, scales)[:, :k]
    for _ in range(2):  # the second time as when a layer is reloaded
        held = inside(codes, layer.weight.shape), inside(scales, layer.weight_scale.shape)
        layer.weight, layer.weight_scale = (nn.Parameter(t, requires_grad=False) for t in held)
        scheme.process_weights_after_loading(layer)
        assert all(map(torch.equal, aiter.canonical((layer.weight, layer.weight_scale)), expected))
        assert torch.equal(scheme.dequantize(layer, "weight"), want_weight)
    x, bias = torch.randn(2, tokens, k).to(dtype), torch.randn(n_rows)
    out = scheme.apply(layer, x, bias)
    seen = values(*quantize(x.flatten(0, 1)))[:, :k]
    assert (out.dtype, out.shape) == (dtype, (2, tokens, n_rows))
    torch.testing.assert_close(out.flatten(0, 1).float(), seen @ want_weight.T + bias, rtol=2e-2, atol=2e-2)
    assert stand_in.calls == ["gemm_a4w4"] * (tokens > 0)


def test_a_linear_layer_of_several_shards(stand_in: StandIn) -> None:
    """Each is padded by itself, so that what is arranged of all of them is arranged of each."""
    scheme, layer = QuantizedLinearScheme("quark_mxfp4", Quantizer(through_aiter())), cast("Any", nn.Module())
    scheme.create_weights(layer, shards=(("q", 100), ("k", 257)), in_features=90)
    weights = [torch.randn(rows, 90) * 0.05 for rows in (100, 257)]
    pairs = [quantize(weight) for weight in weights]
    for number, (name, width) in enumerate((("weight", 128), ("weight_scale", 8))):
        held = [
            inside(pair[number], (aiter.padded(rows), width), 0) for pair, rows in zip(pairs, (100, 257), strict=True)
        ]
        layer.register_parameter(name, nn.Parameter(torch.cat(held), requires_grad=False))
    want = torch.cat([values(*pair)[:, :90] for pair in pairs])
    scheme.process_weights_after_loading(layer)
    assert torch.equal(scheme.dequantize(layer, "weight"), want)
    x, bias = torch.randn(3, 90), torch.randn(357)
    seen = values(*quantize(x))[:, :90]
    torch.testing.assert_close(scheme.apply(layer, x, bias), seen @ want.T + bias, rtol=2e-2, atol=2e-2)


def test_a_weight_that_is_not_padded_is_named() -> None:
    codes, scales = quantize(torch.randn(100, 90))
    with pytest.raises(ValueError, match=r"a \[256, 256\] weight has codes \[256, 128\]"):
        aiter.AiterLinear()(torch.randn(2, 90), (codes, scales), None, 100, 90)
    codes, scales = torch.zeros(256, 128, dtype=torch.uint8), torch.zeros(256, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bias must have shape \[100\], got \[256\]"):
        aiter.AiterLinear()(torch.randn(2, 90), (codes, scales), torch.zeros(256), 100, 90)


class Experts(nn.Module):
    """A SwiGLU experts layer as transformers' interface describes them."""

    has_gate, has_bias, is_concatenated, is_transposed = True, False, True, False
    num_experts = 3

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = self.act_fn(gate) * up
        return gated


class Dirty(FinalStorage):
    """Hands out memory as another tensor left it."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = super().empty(shape, dtype)
        tensor.view(torch.uint8).fill_(77)
        return tensor


def loaded(
    scheme: QuantizedMoEScheme, layer: Any, hidden: int = 512, intermediate: int = 256, times: int = 1
) -> dict[str, Tensor]:
    """Load random weights through the layer's closures, and reload them; returns what their codes stand for."""
    shards = {"gate_up_proj": (("w1", intermediate), ("w3", intermediate)), "down_proj": (("w2", hidden),)}
    columns = {"gate_up_proj": hidden, "down_proj": intermediate}
    sizes: dict[str, Any] = {name: (shards[name], columns[name]) for name in shards}
    scheme.create_weights(layer, num_experts=3, **sizes)
    loader = MoeOnlineWeightLoader(layer, scheme, storage=Dirty(torch.device("cpu")))
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, parts in shards.items():
        size = 3, sum(rows for _, rows in parts), columns[name]
        weights[name] = torch.randn(size, generator=generator) * 0.05
    for time in range(times):
        if time:
            loader.reset()
        for name, parts in shards.items():
            for expert, weight in enumerate(weights[name]):
                for (shard_id, _), piece in zip(parts, weight.split([rows for _, rows in parts]), strict=True):
                    loader(layer._parameters[name], piece, shard_id=shard_id, expert_id=expert)
    return {
        name: torch.stack([values(*quantize(each))[:, : columns[name]] for each in weight])
        for name, weight in weights.items()
    }


def test_a_reload_leaves_nothing_of_the_load_before_in_the_padding(stand_in: StandIn) -> None:
    """Codes that were arranged lie where the next ones have zeros."""
    scheme, layer, again = QuantizedMoEScheme("quark_mxfp4", Quantizer(through_aiter())), Experts(), Experts()
    loaded(scheme, layer, 90, 100)
    loaded(scheme, again, 90, 100, times=2)
    for name, tensor in layer.named_parameters():
        assert torch.equal(again.get_parameter(name), tensor)


@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (90, 100), (288, 33)])
def test_a_whole_experts_layer(stand_in: StandIn, hidden: int, intermediate: int) -> None:
    scheme, layer = QuantizedMoEScheme("quark_mxfp4", Quantizer(through_aiter())), Experts()
    weights = loaded(scheme, layer, hidden, intermediate)
    wide, inner = aiter.padded(hidden), aiter.padded(intermediate)
    assert layer.get_parameter("gate_up_proj").shape == (3, 2 * inner, wide // 2)
    assert layer.get_parameter("down_proj_scale").shape == (3, wide, inner // 32)
    for name, want in weights.items():
        assert torch.equal(scheme.dequantize(layer, name), want)
    codes, scales = aiter.canonical((layer.get_parameter("gate_up_proj"), layer.get_parameter("gate_up_proj_scale")))
    for start in (0, inner):  # gate, and up at a multiple of 256 rows
        assert codes[:, start : start + intermediate, : hidden // 2].any()
        assert not codes[:, start + intermediate : start + inner].any()
        assert not scales[:, start + intermediate : start + inner].any()
    assert not codes[..., -(-hidden // 32) * 16 :].any()
    assert not scales[..., -(-hidden // 32) :].any()

    x, ids = torch.randn(5, hidden).bfloat16(), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    shares = torch.rand(5, 2)
    out = scheme.apply(layer, x, ids, shares)
    assert (out.dtype, out.shape) == (torch.bfloat16, x.shape)
    assert stand_in.calls == ["fused_moe"]
    plain, twin = QuantizedMoEScheme("quark_mxfp4", Quantizer(kernel_set("mxfp4", "cpu")), EMULATED), Experts()
    assert all(torch.equal(want, weights[name]) for name, want in loaded(plain, twin, hidden, intermediate).items())
    want = plain.apply(twin, x, ids, shares)
    # a sum in another order may round to another BF16 in between, and that to another code
    assert float((out - want).float().norm() / want.float().norm()) < 0.02


@pytest.mark.parametrize("what", ["has_bias", "is_interleaved", "other_activation", "learned", "post_norm", "parallel"])
def test_what_is_no_plain_swiglu_is_not_fused(stand_in: StandIn, what: str) -> None:
    scheme, layer = QuantizedMoEScheme("quark_mxfp4", Quantizer(through_aiter())), Experts()
    changes: dict[str, tuple[str, Any]] = {
        "has_bias": ("has_bias", True),
        "is_interleaved": ("is_concatenated", False),
        "other_activation": ("act_fn", nn.GELU()),
        "learned": ("act_fn", nn.PReLU(device="meta")),
        "post_norm": ("has_post_expert_norm", True),
        "parallel": ("_is_expert_parallel", True),
    }
    setattr(layer, *changes[what])
    weights = loaded(scheme, layer, 90, 100)
    assert not layer.experts_are_fused
    codes, scales = quantize(torch.zeros(200, 90))
    assert layer.get_parameter("gate_up_proj").shape == (3, *codes.shape)  # no padding
    assert layer.get_parameter("gate_up_proj_scale").shape == (3, *scales.shape)
    for name, want in weights.items():
        assert torch.equal(scheme.dequantize(layer, name), want)


@pytest.mark.parametrize(("name", "chunk"), [("llama_odd", 4096), ("qwen3_moe_odd", 4096), ("qwen3_moe", 1 << 20)])
def test_a_load_counts_the_padding(
    stand_in: StandIn, name: str, chunk: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_quantized(checkpoint(name), "quark_mxfp4", device="cpu")
    monkeypatch.setattr(registry, "kernel_set", lambda *_: through_aiter())
    options = LoadOptions(chunk_bytes=chunk)
    padded = load_quantized(checkpoint(name), "quark_mxfp4", device="cpu", options=options)
    report = padded.load_report
    assert report.final_bytes == report.predicted_final_bytes
    assert report.final_bytes > plain.load_report.final_bytes
    for layer, twin in zip(report.layers, plain.load_report.layers, strict=True):
        assert "linear=aiter" in layer.kernel
        assert layer.bytes_out > twin.bytes_out
        assert (layer.numel, layer.bytes_in) == (twin.numel, twin.bytes_in)
        assert layer.sqnr_db == pytest.approx(twin.sqnr_db, abs=1e-3)  # summed piece by piece
        for weight in layer_weights(padded.get_submodule(layer.name)):
            want = plain.get_submodule(layer.name).dequantize(weight)
            assert torch.equal(padded.get_submodule(layer.name).dequantize(weight), want)


@pytest.mark.parametrize("name", ["quark_llama_mxfp4", "quark_qwen3moe_mxfp4"])
def test_codes_that_are_stored_are_padded_too(
    stand_in: StandIn, name: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_quantized(golden / name, device="cpu")
    monkeypatch.setattr(registry, "kernel_set", lambda *_: through_aiter())
    padded = load_quantized(golden / name, device="cpu", options=LoadOptions(chunk_bytes=4096))
    assert padded.load_report.final_bytes > plain.load_report.final_bytes
    for layer in padded.load_report.layers:
        for weight in layer_weights(padded.get_submodule(layer.name)):
            want = plain.get_submodule(layer.name).dequantize(weight)
            assert torch.equal(padded.get_submodule(layer.name).dequantize(weight), want)


def test_a_linear_layer_that_is_reloaded_has_zeros_in_its_padding(
    stand_in: StandIn, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "kernel_set", lambda *_: through_aiter())
    model = load_quantized(checkpoint("llama_odd"), "quark_mxfp4", device="cpu")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = layer.dequantize()
    layer.weight.weight_loader.reset()
    layer.weight.weight_loader(layer.weight, weight)
    after = layer.state_dict()
    assert torch.equal(after["weight"], before["weight"])
    assert torch.equal(after["weight_scale"], before["weight_scale"])


def layer_weights(module: Any) -> list[str]:
    return [*module.scheme.layouts(module)]


def test_only_on_rocm(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert aiter.missing() == "aiter is for ROCm, and this torch is not built for it"
    assert "this GPU is gfx942" in (aiter.lacks(MXFP4, GpuTarget("gfx942")) or "")
    assert aiter.lacks(MXFP4, GFX950) is None


def test_not_installed(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert aiter.missing() == "AMD's aiter is not installed; get it from github.com/ROCm/aiter"


def test_the_asyncio_package_is_told_apart_and_not_imported(
    forget: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = aiter.missing() or ""
    assert "is not AMD's but the asyncio package of that name on PyPI" in reason
    assert str(tmp_path) in reason
    monkeypatch.setitem(sys.modules, "aiter", types.ModuleType("aiter"))
    with pytest.raises(NotUsable, match="not AMD's"):
        aiter.load()


def test_an_aiter_that_lacks_a_function_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["aiter.ops.shuffle"], "shuffle_weight")
    assert "shuffle_weight" in (aiter.missing() or "")


def test_usable(stand_in: StandIn) -> None:
    assert aiter.missing() is None
