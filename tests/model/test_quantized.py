"""The modules of a quantized model are modules like others: copied, pickled, moved, converted, freed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, logits
from quantload import load_quantized
from quantload.errors import RouteError, UnsupportedCheckpointError
from quantload.model.quantized import DtypeFacade, QuantizedLinear, QuantizedLinearReadByDtype
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


def linear(
    scheme: str = "int8_per_channel", bias: bool = True, transposed: bool = False, cls: type = QuantizedLinear
) -> Any:
    """A quantized linear layer [48, 80] with real codes."""
    made: Any = SchemeFactory(CPU, LoadOptions()).linear(scheme)
    module = cls(made, 80, 48, nn.Parameter(torch.randn(48, dtype=torch.bfloat16)) if bias else None, transposed)
    layout = module.weight_layout
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes = torch.empty(layout.shapes[0], dtype=layout.format.code_dtype)
    scales = torch.empty(layout.shapes[1], dtype=layout.format.scale_dtype)
    assert made.kernels.quantize(weight, (codes, scales)) == 0
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.weight_scale = nn.Parameter(scales, requires_grad=False)
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
    assert same_bytes(module.weight, before["weight"])
    assert same_bytes(module.weight_scale, before["weight_scale"])
    assert module.bias.dtype == dtype
    assert module(torch.randn(2, 80, dtype=dtype)).dtype == dtype


def test_what_is_no_dtype_conversion_reaches_codes_and_scales() -> None:
    module = linear()
    assert {p.device.type for p in copy.deepcopy(module).to("meta").parameters()} == {"meta"}
    assert {p.device.type for p in copy.deepcopy(module).to("meta", torch.float32).parameters()} == {"meta"}
    assert all(p.is_shared() for p in copy.deepcopy(module).share_memory().parameters())


# The face for models that read `weight.dtype`


def read_by_dtype() -> QuantizedLinearReadByDtype:
    module: QuantizedLinearReadByDtype = linear(cls=QuantizedLinearReadByDtype)
    module.compute_dtype = torch.bfloat16
    return module


def test_the_face_answers_dtype_and_the_parameter_does_not() -> None:
    module = read_by_dtype()
    assert module.weight.dtype == torch.bfloat16
    assert isinstance(module.weight, DtypeFacade)
    assert dict(module.named_parameters())["weight"].dtype == torch.int8
    assert module.state_dict()["weight"].dtype == torch.int8
    assert torch.equal(module.weight.data.as_subclass(Tensor), module._parameters["weight"].data)  # type: ignore[union-attr]


def test_the_face_has_what_was_attached_to_the_parameter() -> None:
    module = read_by_dtype()
    module._parameters["weight"].weight_loader = "closure"  # type: ignore[union-attr]
    assert module.weight.weight_loader == "closure"
    assert module.weight.shape == (48, 80)
    assert module.weight.device == CPU


def test_a_graph_sees_the_dtype_of_the_face() -> None:
    module, x = read_by_dtype(), torch.randn(3, 80)

    def forward(x: Tensor) -> Tensor:
        wanted = module.weight
        out: Tensor = module(x.to(wanted.dtype)) if wanted.shape == (48, 80) else x
        return out

    with torch.no_grad():
        got = torch.compile(forward, backend="eager", fullgraph=True)(x)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, module(x.bfloat16()))


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


def test_other_attributes_are_as_everywhere() -> None:
    module = read_by_dtype()
    assert module.weight_scale.dtype == torch.float32
    assert module.bias.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="weights"):
        _ = module.weights


def test_the_face_follows_a_dtype_conversion() -> None:
    module = read_by_dtype().to(torch.float32)
    assert module.weight.dtype == torch.float32
    assert module._parameters["weight"].dtype == torch.int8  # type: ignore[union-attr]
    assert module.to("cpu").weight.dtype == torch.float32


# Whole models


def test_a_copy_computes_the_same_and_is_independent(loaded: tuple[str, PreTrainedModel]) -> None:
    name, model = loaded
    inputs = BY_NAME[name].inputs()
    want = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), want)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in twin.parameters()}
    for module in twin.modules():
        if hasattr(module, "scheme"):
            for name_, parameter in module._parameters.items():
                if parameter is not None and name_.endswith("_scale"):
                    parameter.data.zero_()
    assert torch.equal(logits(model, inputs), want)
    assert not torch.equal(logits(twin, inputs), want)


def test_a_copys_experts_dequantize_the_copy(loaded: tuple[str, PreTrainedModel]) -> None:
    _, model = loaded
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if hasattr(module, "scheme") and not isinstance(module, QuantizedLinear):
            module.down_proj_scale.data.zero_()
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
                assert same_bytes(module._parameters[key], original._parameters[key]), path
                scale = f"{key}_scale"
                assert same_bytes(module._parameters[scale], original._parameters[scale]), path
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
    for parameter in first.parameters():
        parameter.data.zero_()
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
