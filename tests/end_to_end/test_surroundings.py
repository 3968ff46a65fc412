"""A load gives the same model whatever goes on around it: other loads, inference mode, another default dtype."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from architectures import logits, named
from quantload import LoadOptions, convert_checkpoint, load_quantized, plan_quantized

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_loads_in_several_threads_are_like_loads_alone(checkpoint: Checkpoint, name: str) -> None:
    path = checkpoint(name)
    alone = load_quantized(path, "fp8_per_block").state_dict()
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load_quantized(path, "fp8_per_block"), range(12)))
    assert torch.get_default_dtype() == torch.float32
    for model in models:
        found = model.state_dict()
        assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in alone.items()}
        assert all(
            torch.equal(found[key].reshape(-1).view(torch.uint8), alone[key].reshape(-1).view(torch.uint8))
            for key in alone
        )


def test_a_load_inside_of_inference_mode_gives_an_ordinary_model(checkpoint: Checkpoint) -> None:
    with torch.inference_mode():
        model = load_quantized(checkpoint("llama"))
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert (model.load_report.layers[0].sqnr_db or 0.0) > 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_not_asked(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    path, inputs = checkpoint("qwen3_moe"), named("qwen3_moe")[0].inputs()
    want = logits(load_quantized(path), inputs)
    torch.set_default_dtype(dtype)
    try:
        model = load_quantized(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(model, inputs), want)


def test_the_default_device_is_not_asked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path, inputs = checkpoint("qwen3_moe"), named("qwen3_moe")[0].inputs()
    want = logits(load_quantized(path, device="cpu"), inputs)
    with torch.device("meta"):
        model = load_quantized(path, device="cpu")
        plan_quantized(path, device="cpu")
        convert_checkpoint(path, tmp_path / "out", "quark_mxfp4")
    assert torch.equal(logits(model, inputs), want)
    again = load_quantized(tmp_path / "out", device="cpu", options=LoadOptions(activations="none"))
    assert torch.equal(logits(again, inputs), want)


def test_gradients_reach_the_embeddings_as_in_the_dequantized_model(checkpoint: Checkpoint) -> None:
    model = load_quantized(checkpoint("llama_float32"))
    embeddings = torch.randn(1, 6, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    want, embeddings.grad = embeddings.grad, None
    assert want is not None
    step = 1e-3 * want / want.norm()
    with torch.no_grad():
        up, down = (model(inputs_embeds=embeddings + sign * step).logits.double().sum() for sign in (1, -1))
    slope = float(up - down) / (2 * float(step.norm()))
    assert slope == pytest.approx(float(want.norm()), rel=0.05)
