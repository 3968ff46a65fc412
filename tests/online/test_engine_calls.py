"""The closures through calls of the form that the `load_weights` of vLLM 0.33 and SGLang 0.5.23 make.

`load_weights` of each engine is written here in its form: which names become which shard, and how a closure is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from quantload.errors import ShapeMismatchError
from quantload.geometry.layout import ShardId, WeightLayout
from quantload.online.engine_calls import NOT_GIVEN, Shard, shard_of
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.online.parameter import materialized_in
from quantload.online.quantizing import LayerProgress, linear_quantizer
from quantload.online.storage import FinalStorage
from quantload.online.weight_loader import OnlineWeightLoader
from quantload.options import LoadOptions
from quantload.schemes.base import meta_parameter
from quantload.schemes.moe import QuantizedMoEScheme
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn

Q, KV, HIDDEN, INTERMEDIATE, EXPERTS = 64, 32, 64, 96, 4
CPU = torch.device("cpu")
Weights = dict[str, Tensor]

STACKED: list[tuple[str, str, ShardId]] = [
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]
EXPERT_MAPPING = [
    (f"experts.{param}", f"experts.{expert}.{name}.", expert, shard)
    for expert in range(EXPERTS)
    for param, name, shard in (("w13_", "gate_proj", "w1"), ("w2_", "down_proj", "w2"), ("w13_", "up_proj", "w3"))
]


class EngineModel(nn.Module):
    """The layers of an engine: q, k, v as one, gate and up as one, and fused experts; each parameter has a closure."""

    def __init__(self, scheme_name: str) -> None:
        super().__init__()
        factory = SchemeFactory(CPU, LoadOptions())
        linear, experts = factory.linear(scheme_name), factory.experts(scheme_name)
        assert linear is not None
        assert isinstance(experts, QuantizedMoEScheme)
        self.linear_scheme, self.experts_scheme = linear, experts
        self.finished: list[str] = []
        self.qkv_proj = self._linear("qkv_proj", (("q", Q), ("k", KV), ("v", KV)))
        self.gate_up_proj = self._linear("gate_up_proj", (("gate", INTERMEDIATE), ("up", INTERMEDIATE)))
        self.o_proj = self._linear("o_proj", (("", HIDDEN),))
        self.experts = self._experts()

    def _linear(self, name: str, shards: tuple[tuple[str, int], ...]) -> nn.Module:
        layout = WeightLayout(self.linear_scheme.kernels.format, None, shards, HIDDEN)
        layer = nn.Module()
        for suffix, (dtype, shape) in zip(layout.format.suffixes, layout.tensors, strict=True):
            layer.register_parameter(f"weight{suffix}", meta_parameter(shape, dtype))
        parameter = materialized_in(layer, "weight", f"{name}.weight", layout, FinalStorage(CPU))
        progress = LayerProgress({"weight": parameter}, lambda _: self.finished.append(name))
        weight: Any = layer.get_parameter("weight")
        weight.weight_loader = OnlineWeightLoader("weight", linear_quantizer(self.linear_scheme, progress))
        return layer

    def _experts(self) -> nn.Module:
        layer: Any = nn.Module()
        layer.weight_layouts = {
            "w13_weight": WeightLayout(
                self.experts_scheme.kernels.format, EXPERTS, (("w1", INTERMEDIATE), ("w3", INTERMEDIATE)), HIDDEN
            ),
            "w2_weight": WeightLayout(self.experts_scheme.kernels.format, EXPERTS, (("w2", HIDDEN),), INTERMEDIATE),
        }
        for name, layout in layer.weight_layouts.items():
            for suffix, (dtype, shape) in zip(layout.format.suffixes, layout.tensors, strict=True):
                layer.register_parameter(f"{name}{suffix}", meta_parameter(shape, dtype))
        loader = MoeOnlineWeightLoader(
            layer, self.experts_scheme, name="experts", on_finished=lambda *_: self.finished.append("experts")
        )
        for name in layer.weight_layouts:
            layer._parameters[name].weight_loader = loader.bound(name)
        return layer  # type: ignore[no-any-return]


def default_weight_loader(param: Tensor, loaded_weight: Tensor, *_: object) -> None:
    raise AssertionError("every parameter here has a closure of its own")


def vllm(model: EngineModel, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """As `Qwen3MoeModel.load_weights`."""
    params, loaded = dict(model.named_parameters()), set()
    for name, loaded_weight in weights:
        for param_name, weight_name, shard_id in STACKED:
            if weight_name not in name or "experts" in name:
                continue
            name = name.replace(weight_name, param_name)
            param: Any = params[name]
            weight_loader = getattr(param, "weight_loader", default_weight_loader)
            weight_loader(param, loaded_weight, shard_id)
            break
        else:
            for param_name, weight_name, expert_id, shard in EXPERT_MAPPING:
                if weight_name not in name:
                    continue
                name = name.replace(weight_name, param_name)
                param = params[name]
                success = param.weight_loader(
                    param, loaded_weight, name, shard_id=shard, expert_id=expert_id, return_success=True
                )
                assert success is True
                break
            else:
                param = params[name]
                getattr(param, "weight_loader", default_weight_loader)(param, loaded_weight)
        loaded.add(name)
    return loaded


def sglang(model: EngineModel, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """As `Qwen3MoeForCausalLM.load_weights` and the models that hand a chunk over by position."""
    params, loaded = dict(model.named_parameters()), set()
    for name, loaded_weight in weights:
        stacked = next((each for each in STACKED if each[1] in name and "experts" not in name), None)
        mapped = next((each for each in EXPERT_MAPPING if each[1] in name), None)
        if stacked is not None:
            name = name.replace(stacked[1], stacked[0])
            param: Any = params[name]
            param.weight_loader(param, loaded_weight, stacked[2])
        elif mapped is not None:
            param_name, weight_name, expert_id, shard_id = mapped
            name = name.replace(weight_name, param_name)
            param = params[name]
            param.weight_loader(param, loaded_weight, name, shard_id, expert_id)
        else:
            param = params[name]
            param.weight_loader(param, loaded_weight)
        loaded.add(name)
    return loaded


def fused(model: EngineModel, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """As the models whose checkpoints hold q, k, v in one tensor, gate and up too, and all experts of a shard."""
    held = dict(weights)
    q, k, v = (held[f"{name}_proj.weight"] for name in "qkv")
    gate, up = held["gate_proj.weight"], held["up_proj.weight"]
    calls: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("qkv_proj.weight", torch.cat([q, k, v]), {"loaded_shard_id": None}),
        ("gate_up_proj.weight", torch.cat([gate, up]), {"loaded_shard_id": (0, 1)}),
        ("o_proj.weight", held["o_proj.weight"], {}),
    ]
    for shard, kind in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        stacked = torch.stack([held[f"experts.{expert}.{kind}_proj.weight"] for expert in range(EXPERTS)])
        name = "experts.w2_weight" if shard == "w2" else "experts.w13_weight"
        calls.append((name, stacked, {"weight_name": name, "shard_id": shard, "expert_id": 0}))
    params = dict(model.named_parameters())
    for name, tensor, how in calls:
        param: Any = params[name]
        param.weight_loader(param, tensor, **how)
    return {name for name, _, _ in calls}


def checkpoint() -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (Q, HIDDEN), "k_proj": (KV, HIDDEN), "v_proj": (KV, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
    for expert in range(EXPERTS):
        shapes |= {f"experts.{expert}.{kind}_proj": (INTERMEDIATE, HIDDEN) for kind in ("gate", "up")}
        shapes[f"experts.{expert}.down_proj"] = (HIDDEN, INTERMEDIATE)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()
    }


def parts(weights: Weights) -> Iterator[tuple[str, int | None, list[Tensor]]]:
    """What belongs below each other in each parameter, and in which expert of it."""
    yield "qkv_proj.weight", None, [weights[f"{name}_proj.weight"] for name in "qkv"]
    yield "gate_up_proj.weight", None, [weights["gate_proj.weight"], weights["up_proj.weight"]]
    yield "o_proj.weight", None, [weights["o_proj.weight"]]
    for expert in range(EXPERTS):
        own = {kind: weights[f"experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        yield "experts.w13_weight", expert, [own["gate"], own["up"]]
        yield "experts.w2_weight", expert, [own["down"]]


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "backwards"])
@pytest.mark.parametrize("load_weights", [vllm, sglang, fused])
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "mxfp8", "fp8_per_tensor", "fp8_per_channel", "int8_per_channel"])
def test_every_parameter_holds_the_codes_of_its_shards(
    scheme: str, load_weights: Callable[[EngineModel, Iterable[tuple[str, Tensor]]], set[str]], reverse: bool
) -> None:
    model, weights = EngineModel(scheme), checkpoint()
    loaded = load_weights(model, list(weights.items())[:: -1 if reverse else 1])
    assert loaded == {name for name, _, _ in parts(weights)}
    assert sorted(model.finished) == ["experts", "gate_up_proj", "o_proj", "qkv_proj"]
    tensors = dict(model.named_parameters())
    for name, expert, shards in parts(weights):
        kernels: Any = model.linear_scheme if expert is None else model.experts_scheme
        fmt = kernels.kernels.format
        got = [tensors[f"{name}{suffix}"].data for suffix in ("", "_scale")]
        for number, wanted in enumerate(
            zip(*(quantized(kernels.kernels, fmt, shard) for shard in shards), strict=True)
        ):
            found = got[number] if expert is None else got[number][expert]
            assert torch.equal(found.view(torch.uint8), torch.cat([each.view(torch.uint8) for each in wanted])), name


def quantized(kernels: Any, fmt: Any, weight: Tensor) -> tuple[Tensor, ...]:
    """The tensors of one matrix."""
    layout = WeightLayout(fmt, None, (("", len(weight)),), weight.shape[1])
    tensors = tuple(torch.empty(shape, dtype=dtype) for dtype, shape in layout.tensors)
    assert kernels.quantize(weight, tensors) == 0
    return tensors


SHARDS = WeightLayout(None, None, (("q", 8), ("k", 4), ("v", 2)), 32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shard_id", "rows"),
    [
        ("q", (0, 8)),
        ("v", (12, 14)),
        (0, (0, 8)),
        (2, (12, 14)),
        ((0, 1), (0, 12)),
        ((1, 2), (8, 14)),
        ((0, 1, 2), (0, 14)),
        (None, (0, 14)),
    ],
)
def test_shards_have_names_and_numbers(shard_id: ShardId, rows: tuple[int, int]) -> None:
    assert SHARDS.shard_rows(shard_id) == rows


@pytest.mark.parametrize("shard_id", ["o", 3, -1, (), (0, 2), (1, 0), (2, 3), "w13"])
def test_a_shard_that_is_not_there_is_refused(shard_id: ShardId) -> None:
    with pytest.raises(KeyError, match="there are 'q', 'k', 'v'"):
        SHARDS.shard_rows(shard_id)


def call(*positional: Any, **keywords: Any) -> Shard:
    given = {"weight_name": None, "shard_id": NOT_GIVEN, "loaded_shard_id": NOT_GIVEN, "expert_id": NOT_GIVEN}
    return shard_of("layer.weight", positional, **{**given, "return_success": False, **keywords})


def test_what_stands_behind_the_tensor_is_a_shard_unless_keywords_say_which() -> None:
    assert call() == (None, None, False)
    assert call("q") == call(shard_id="q") == call(loaded_shard_id="q") == ("q", None, False)
    assert call((0, 1)) == ((0, 1), None, False)
    wanted = ("w1", 3, True)
    assert call("a.w13", shard_id="w1", expert_id=3, return_success=True) == wanted
    assert call(weight_name="a.w13", shard_id="w1", expert_id=3, return_success=True) == wanted
    assert call("a.w13", "w1", 3, True) == wanted
    assert call("w1", 3, True, weight_name="a.w13") == wanted
    assert call("a.w13", expert_id=3) == (None, 3, False)
    assert call(weight_name="a.w13", shard_id=None, expert_id=None) == (None, None, False)


@pytest.mark.parametrize(
    ("positional", "keywords"),
    [
        (("q",), {"loaded_shard_id": "k", "shard_id": "q"}),
        (("name", "w1"), {"shard_id": "w1"}),
        (("name", "w1", 3), {"expert_id": 3}),
        (("name", "w1", 3, True, 5), {}),
    ],
)
def test_calls_that_say_something_twice_are_refused(positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    with pytest.raises(ShapeMismatchError, match=r"layer\.weight"):
        call(*positional, **keywords)


def test_the_experts_of_a_stack_must_be_as_many_as_the_layer_has() -> None:
    param: Any = EngineModel("int8_per_channel").experts.w2_weight
    with pytest.raises(ShapeMismatchError, match="3 experts where those of 4 belong"):
        param.weight_loader(param, torch.zeros(3, HIDDEN, INTERMEDIATE), "name", shard_id="w2", expert_id=0)


def test_return_success_is_answered_and_nothing_else() -> None:
    model = EngineModel("int8_per_channel")
    param: Any = model.experts.w2_weight
    weight = torch.zeros(HIDDEN, INTERMEDIATE)
    answers = [
        param.weight_loader(param, weight, "name", shard_id="w2", expert_id=expert, return_success=asked)
        for expert, asked in enumerate(itertools.islice(itertools.cycle((True, False)), EXPERTS))
    ]
    assert answers == [True, None, True, None]
    assert param.weight_loader.supports_moe_loading
    assert not model.o_proj.weight.weight_loader.supports_moe_loading  # type: ignore[union-attr]
