"""The modules of a quantized model are modules like others: copied, pickled, moved, converted, freed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import BY_NAME, logits
from quantload import load_quantized
from quantload.cli import DEMO_MODEL
from quantload.errors import QuantizedWeightError, RouteError, UnsupportedCheckpointError
from quantload.model.quantized import QuantizedLinear, say_what_codes_stand_for
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn
from transformers import PreTrainedModel

CPU = torch.device("cpu")
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

Checkpoint = Callable[[str], Path]


def linear(scheme: str = "int8_per_channel", bias: bool = True, transposed: bool = False) -> Any:
    """A quantized linear layer [48, 80] with real codes."""
    made: Any = SchemeFactory(CPU, LoadOptions()).linear(scheme)
    biases = nn.Parameter(torch.randn(48, dtype=torch.bfloat16)) if bias else None
    module: Any = QuantizedLinear(made, 80, 48, biases, transposed)
    layout = module.weight_layout
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes = torch.empty(layout.shapes[0], dtype=layout.format.code_dtype)
    scales = torch.empty(layout.shapes[1], dtype=layout.format.scale_dtype)
    assert made.kernels.quantize(weight, (codes, scales)) == 0
    module.weight = module.weight.around(codes)
    module.weight_scale = module.weight_scale.around(scales)
    say_what_codes_stand_for(module, "model.layers.7.mlp.down", torch.bfloat16)
    return module


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture(scope="module", params=["qwen3_moe", "t5", "llama4"])
def loaded(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> tuple[str, PreTrainedModel]:
    """Linears and experts; a model that reads `weight.dtype`; experts with a forward of their own."""
    return request.param, load_quantized(checkpoint(request.param), "fp8_per_channel")


# One layer


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_holds_codes_and_scales_and_answers_as_its_dequantized_twin(scheme: str, bias: bool) -> None:
    module = linear(scheme, bias)
    assert set(module.state_dict()) == {"weight", "weight_scale"} | ({"bias"} if bias else set())
    x = torch.randn(3, 2, 80).to(torch.bfloat16)
    want = nn.functional.linear(x.float(), module.dequantize().to(torch.bfloat16).float(), None)
    want = want + module.bias.float() if bias else want
    got = module(x)
    assert (got.shape, got.dtype) == ((3, 2, 48), torch.bfloat16)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=5e-2)


def test_a_transposed_layer_dequantizes_to_the_shape_it_stands_for() -> None:
    assert linear(transposed=False).dequantize().shape == (48, 80)
    assert linear(transposed=True).dequantize().shape == (80, 48)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_need_no_gradient_and_a_bias_may(scheme: str) -> None:
    module = linear(scheme)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == {
        "weight": False,
        "weight_scale": False,
        "bias": True,
    }
    module.requires_grad_(False)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("convert", ["float", "half", "bfloat16", "to"])
def test_a_dtype_conversion_leaves_codes_and_scales_alone(scheme: str, convert: str) -> None:
    module = linear(scheme)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module = module.to(torch.float16) if convert == "to" else getattr(module, convert)()
    dtype = {"float": torch.float32, "bfloat16": torch.bfloat16}.get(convert, torch.float16)
    assert same_bytes(module.state_dict()["weight"], before["weight"])
    assert same_bytes(module.state_dict()["weight_scale"], before["weight_scale"])
    assert module.bias.dtype == dtype
    assert module(torch.randn(2, 80, dtype=dtype)).dtype == dtype


def test_what_is_no_dtype_conversion_reaches_codes_and_scales() -> None:
    module = linear()
    assert {p.device.type for p in copy.deepcopy(module).to("meta").parameters()} == {"meta"}
    assert {p.device.type for p in copy.deepcopy(module).to("meta", torch.float32).parameters()} == {"meta"}
    assert all(p.is_shared() for p in copy.deepcopy(module).share_memory().parameters())


# What code sees of a weight


def test_a_weight_has_the_dtype_of_computing_and_the_state_dict_that_of_the_codes() -> None:
    module = linear()
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(p.is_floating_point() and torch.is_floating_point(p) for p in module.parameters())
    assert module.weight.dtype == module.weight.data.dtype == module.weight.detach().dtype == torch.bfloat16
    assert {name: t.dtype for name, t in module.state_dict().items()} == {
        "weight": torch.int8, "weight_scale": torch.float32, "bias": torch.bfloat16,
    }  # fmt: skip
    assert type(module.state_dict()["weight"]) is Tensor


def test_a_weight_says_where_and_how_large_it_is() -> None:
    module = linear()
    module.weight.weight_loader = "closure"
    weight = module.weight
    assert (weight.weight_loader, weight.shape, weight.device, weight.is_meta) == ("closure", (48, 80), CPU, False)
    assert (weight.numel(), weight.element_size(), weight.nbytes) == (3840, 1, 3840)
    assert (weight.dim(), weight.size(0)) == (2, 48)
    assert weight.untyped_storage().data_ptr() == module.state_dict()["weight"].data_ptr()
    assert isinstance(weight, nn.Parameter)
    assert "int8" in repr(weight)


CASTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "to_dtype": lambda w, x: x.to(w.dtype),
    "to_like": lambda w, x: x.to(w),
    "to_named": lambda w, x: cast("Any", x).to(tensor=w),
    "type_as": lambda w, x: x.type_as(w),
    "new_zeros": lambda w, _: w.new_zeros(3),
    "new_ones": lambda w, _: w.new_ones(3),
    "new_full": lambda w, _: w.new_full((3,), 2),
    "new_empty": lambda w, _: w.new_empty(3),
    "new_tensor": lambda w, _: w.new_tensor([1.5]),
}


@pytest.mark.parametrize("cast", CASTS)
def test_what_is_cast_to_a_weight_gets_the_dtype_of_computing(cast: str) -> None:
    assert CASTS[cast](linear().weight, torch.zeros(3)).dtype == torch.bfloat16


NAME = r"^model\.layers\.7\.mlp\.down\.weight "
USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "linear": lambda w, x: nn.functional.linear(x, w),
    "data": lambda w, x: nn.functional.linear(x, w.data),
    "detach": lambda w, x: x @ w.detach(),
    "matmul": lambda w, x: torch.matmul(x, w.T),
    "operator": lambda w, x: x @ w,
    "reflected": lambda w, _: 2 * w,
    "einsum": lambda w, x: torch.einsum("bk,nk->bn", x, w),
    "norm": lambda w, _: w.norm(),
    "index": lambda w, _: w[0],
    "rows": lambda w, _: w[:, torch.tensor([1, 2])],
    "cat": lambda w, _: torch.cat([w, w]),
    "float": lambda w, _: w.float(),
    "cast": lambda w, _: w.to(torch.bfloat16),
    "chunk": lambda w, _: w.chunk(2),
    "item": lambda w, _: w.sum().item(),
    "numpy": lambda w, _: w.numpy(),
    "list": lambda w, _: w.tolist(),
    "iterate": lambda w, _: list(w),
    "initialize": lambda w, _: nn.init.normal_(w),
    "fill": lambda w, _: w.data.zero_(),
    "copy": lambda w, x: w.copy_(x),
    "assign": lambda w, x: setattr(w, "data", x),
    "embed": lambda w, _: nn.functional.embedding(torch.tensor([1]), w),
    "functional_call": lambda w, x: torch.addmm(x, x, w),
    "address": lambda w, _: w.data_ptr(),
    "compare": lambda w, _: torch.equal(w, w),
    "zeros_like": lambda w, _: torch.zeros_like(w),
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_is_not_used_as_numbers(use: str) -> None:
    module = linear()
    before = module.state_dict()["weight"].clone()
    with pytest.raises(QuantizedWeightError, match=NAME + r".*'model\.layers\.\*\.mlp\.down'"):
        USES[use](module.weight, torch.zeros(4, 80, dtype=torch.bfloat16))
    assert torch.equal(module.state_dict()["weight"], before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scheme_gives_its_codes_or_scales_as_numbers(scheme: str) -> None:
    module = linear(scheme)
    for key in ("weight", "weight_scale"):
        with pytest.raises(QuantizedWeightError, match=rf"down\.{key} .*calls matmul"):
            torch.matmul(torch.zeros(4, 48), getattr(module, key))
        assert getattr(module, key).dtype == torch.bfloat16


def test_a_weight_nobody_named_is_refused_too() -> None:
    module = linear()
    say_what_codes_stand_for(module, "", torch.bfloat16)
    with pytest.raises(QuantizedWeightError, match="a quantized weight holds codes"):
        module.weight.sum()


def test_a_weight_goes_elsewhere_as_a_whole() -> None:
    module = linear()
    for moved in (module.weight.cpu(), module.weight.to("cpu"), module.weight.clone(), copy.deepcopy(module.weight)):
        assert (moved.dtype, moved.tensor.dtype) == (torch.bfloat16, torch.int8)
        assert torch.equal(moved.tensor, module.weight.tensor)
    assert module.weight.to("meta").is_meta
    file = io.BytesIO()
    torch.save(module.weight, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert (back.dtype, back.module_name) == (torch.bfloat16, "model.layers.7.mlp.down")
    assert torch.equal(back.tensor, module.weight.tensor)


def test_a_weight_can_be_replaced_by_codes_only() -> None:
    module, twin = linear(), linear()
    twin.weight.data = module.weight.tensor + 1
    assert torch.equal(twin.state_dict()["weight"], module.state_dict()["weight"] + 1)
    assert twin.weight.untyped_storage().data_ptr() == twin.weight.tensor.data_ptr()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_codes_and_they_stay_no_numbers(assign: bool) -> None:
    module, twin = linear(), linear()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["weight"] += 1
    twin.load_state_dict(state, assign=assign)
    assert torch.equal(twin.state_dict()["weight"], state["weight"])
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    with pytest.raises(QuantizedWeightError, match=NAME):
        twin.weight.sum()
    x = torch.randn(3, 80, dtype=torch.bfloat16)
    assert not torch.equal(twin(x), module(x))


GRAPHS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attribute": lambda module, x: module(x.to(module.weight.dtype)),
    "parameters": lambda module, x: module(x.to(next(module.parameters()).dtype)),
    "device": lambda module, x: module(x.to(module.weight.device).bfloat16()),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_sees_the_dtype_of_computing(graph: str) -> None:
    module, x = linear(), torch.randn(3, 80)
    with torch.no_grad():
        got = torch.compile(lambda x: GRAPHS[graph](module, x), backend="eager", fullgraph=True)(x)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, module(x.bfloat16()))


@pytest.mark.parametrize("use", ["linear", "operator", "norm", "index"])
def test_a_graph_does_not_use_a_weight_as_numbers(use: str) -> None:
    module = linear("fp8_per_channel")
    compiled = torch.compile(lambda x: USES[use](module.weight, x), backend="eager")
    with torch.no_grad(), pytest.raises(QuantizedWeightError, match=NAME):
        compiled(torch.zeros(4, 80, dtype=torch.bfloat16))


def test_a_gradient_goes_around_the_graph() -> None:
    module, x = linear(), torch.randn(3, 80, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: module(x * 2) * 2, backend="aot_eager")

    def gradient(of: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        of(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(compiled), gradient(lambda x: module(x * 2) * 2))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="quantload computes gradients"):
        gradient(torch.compile(module.__call__, backend="eager", fullgraph=True))


def test_the_dtype_follows_a_dtype_conversion() -> None:
    module = linear().to(torch.float32)
    assert module.weight.dtype == module.weight_scale.dtype == torch.float32
    assert module.state_dict()["weight"].dtype == torch.int8
    assert module.to("cpu").weight.dtype == torch.float32
    with pytest.raises(QuantizedWeightError, match=NAME):
        module.to("meta").weight.sum()


# Whole models


def test_a_copy_computes_the_same_and_is_independent(loaded: tuple[str, PreTrainedModel]) -> None:
    name, model = loaded
    inputs = BY_NAME[name].inputs()
    want = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), want)
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not pointers & {p.untyped_storage().data_ptr() for p in twin.parameters()}
    for module in twin.modules():
        if hasattr(module, "scheme"):
            for name_, parameter in module._parameters.items():
                if parameter is not None and name_.endswith("_scale"):
                    parameter.tensor.zero_()
    assert torch.equal(logits(model, inputs), want)
    assert not torch.equal(logits(twin, inputs), want)


def test_a_copys_experts_dequantize_the_copy(loaded: tuple[str, PreTrainedModel]) -> None:
    _, model = loaded
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if hasattr(module, "scheme") and not isinstance(module, QuantizedLinear):
            module.down_proj_scale.tensor.zero_()
            assert not module.dequantize("down_proj").any()
            assert model.get_submodule(name).dequantize("down_proj").any()


def test_a_saved_model_comes_back(loaded: tuple[str, PreTrainedModel]) -> None:
    name, model = loaded
    inputs = BY_NAME[name].inputs()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


def test_pickle_too(checkpoint: Checkpoint) -> None:
    """Not for FP8: plain pickle of such a tensor is beyond torch, quantized or not."""
    model = load_quantized(checkpoint("qwen3_moe"))
    inputs = BY_NAME["qwen3_moe"].inputs()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


def test_a_copy_cannot_be_reloaded_into_the_original(loaded: tuple[str, PreTrainedModel]) -> None:
    """A closure knows its layer; one that came along with a copy must not write to the original."""
    _, model = loaded
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        closures = [
            tensor.weight_loader for tensor in (*twin.parameters(), *twin.buffers()) if hasattr(tensor, "weight_loader")
        ]
        for closure in closures:
            with pytest.raises(RouteError, match="belongs to a copy"):
                closure(torch.empty(0), torch.empty(0))
            with pytest.raises(RouteError, match="belongs to a copy"):
                closure.reset()


def test_a_model_in_another_dtype_keeps_its_codes(loaded: tuple[str, PreTrainedModel]) -> None:
    name, model = loaded
    twin = copy.deepcopy(model).to(torch.float32)
    for path, module in twin.named_modules():
        if hasattr(module, "scheme"):
            original = model.get_submodule(path)
            for key in module.scheme.layouts(module):
                for each in (key, f"{key}_scale"):
                    assert same_bytes(module.state_dict()[each], original.state_dict()[each]), path
    kept = {p.dtype for n, p in twin.named_parameters() if "norm" in n}
    assert kept == {torch.float32}
    got, want = logits(twin, BY_NAME[name].inputs()), logits(model, BY_NAME[name].inputs()).float()
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 0.05


def test_state_dict_names(checkpoint: Checkpoint) -> None:
    state = load_quantized(checkpoint("qwen3_moe")).state_dict()
    experts = "model.layers.0.mlp.experts"
    names = {name.removeprefix(f"{experts}.") for name in state if name.startswith(experts)}
    assert names == {"gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"}
    assert state["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    assert state["model.layers.0.self_attn.q_proj.weight_scale"].dtype == torch.uint8
    assert state["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert "model.layers.0.mlp.gate.weight_scale" not in state


def test_a_state_dict_goes_into_another_model_of_the_same_kind(checkpoint: Checkpoint) -> None:
    first, second = (load_quantized(checkpoint("qwen3_moe"), "int8_per_channel") for _ in range(2))
    inputs = BY_NAME["qwen3_moe"].inputs()
    want = logits(first, inputs)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    for tensor in first.state_dict().values():
        tensor.zero_()
    first.load_state_dict(state)
    second.load_state_dict(state)
    assert torch.equal(logits(first, inputs), want)
    assert torch.equal(logits(second, inputs), want)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_a_model_goes_with_its_last_reference(name: str, checkpoint: Checkpoint) -> None:
    """No cycle through a closure or a method: memory is free at once, not at the next collection."""
    model = load_quantized(checkpoint(name))
    gc.collect()
    gc.disable()
    try:
        modules = {path: weakref.ref(module) for path, module in model.named_modules()}
        del model
        assert [path for path, module in modules.items() if module() is not None] == []
    finally:
        gc.enable()


def test_saving_would_write_what_nothing_reads(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = load_quantized(checkpoint("llama"), "quark_mxfp4")
    with pytest.raises(UnsupportedCheckpointError, match=r"quantload convert.*torch\.save"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    load_quantized(checkpoint("llama"), "none").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_layer_whose_data_is_elsewhere_is_not_read(checkpoint: Checkpoint) -> None:
    model = load_quantized(checkpoint("llama"), "quark_mxfp4").to("meta")
    with pytest.raises(ValueError, match="on meta"):
        model(torch.zeros(1, 4, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_channel", "int8_per_channel", "int4_per_group", "nvfp4"])
def test_numbers_in_the_place_of_codes_are_refused(scheme: str) -> None:
    """As accelerate's offloading leaves them: cast to the dtype that code sees."""
    model = load_quantized(DEMO_MODEL, scheme, progress=False)
    ids = torch.tensor([[5, 9, 23]])
    model(ids)
    attention = model.model.layers[0].self_attn.q_proj
    experts = model.model.layers[0].mlp.experts
    for module, name in ((attention, "weight"), (attention, "weight_scale"), (experts, "down_proj")):
        held = module._parameters[name]
        numbers = held.tensor.to(torch.bfloat16 if held.tensor.dtype == torch.float32 else torch.float32)
        for parameter in (type(held)(numbers), torch.nn.Parameter(numbers, requires_grad=False)):
            module._parameters[name] = parameter
            with pytest.raises(QuantizedWeightError, match="where codes and scales are"):
                model(ids)
        module._parameters[name] = held
    model(ids)
