"""torch.compile over loaded models: one graph, no warnings, and what the model computes without it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, logits
from quantload import LoadOptions, load_quantized
from quantload.schemes.registry import ENTRIES

Checkpoint = Callable[[str], Path]
OF_TOKENS = frozenset({"input_ids", "attention_mask", "token_type_ids"})


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(path: Path, name: str, scheme: str, backend: str, options: LoadOptions | None = None) -> None:
    """Compiled logits are those of the model, for another number of tokens, too; nothing interrupts the graph."""
    model = load_quantized(path, scheme, options=options)
    assert model.load_report.layers
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    inputs = BY_NAME[name].inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*(quantload|recompile)")
        for shorter in (0, 1):
            given = {key: value[:, shorter:] if key in OF_TOKENS else value for key, value in inputs.items()}
            assert torch.equal(logits(compiled, given), logits(model, given))


@pytest.mark.parametrize(
    ("name", "scheme", "activations", "backend"),
    [("llama", "quark_mxfp4", "auto", "aot_eager"), ("qwen3_moe", "fp8_per_channel", "emulate", "eager")],
)
def test_a_model_is_one_graph(name: str, scheme: str, activations: Any, backend: str, checkpoint: Checkpoint) -> None:
    check(checkpoint(name), name, scheme, backend, LoadOptions(activations=activations))


def test_autocast_is_a_part_of_the_graph(checkpoint: Checkpoint) -> None:
    model = load_quantized(checkpoint("llama_float16"), "quark_mxfp4")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        given = BY_NAME["llama_float16"].inputs()
        got, want = logits(compiled, given), logits(model, given)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [entry.name for entry in ENTRIES if entry.linear is not None])
def test_every_scheme_is_one_graph(scheme: str, checkpoint: Checkpoint) -> None:
    check(checkpoint("llama"), "llama", scheme, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5", "gpt_oss", "deepseek_v3", "nomic_bert"])
def test_other_models_are_one_graph(name: str, checkpoint: Checkpoint) -> None:
    check(checkpoint(name), name, "quark_mxfp4", "eager")


@pytest.mark.slow
def test_gradients_are_those_without_it(checkpoint: Checkpoint) -> None:
    """The graph breaks at each quantized layer, and the rest is compiled."""
    model = load_quantized(checkpoint("llama"), "quark_mxfp4")
    embedding: torch.Tensor = model.get_input_embeddings().weight
    tokens = BY_NAME["llama"].inputs()["input_ids"]
    compiled = torch.compile(model, backend="aot_eager")

    def gradient(of: Callable[..., Any]) -> torch.Tensor:
        model.zero_grad()
        of(input_ids=tokens).logits.float().square().mean().backward()
        assert embedding.grad is not None
        return embedding.grad

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*(quantload|recompile)")
        assert torch.equal(gradient(compiled), gradient(model))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU, and there is no g++ here")
def test_inductor_computes_the_same(checkpoint: Checkpoint) -> None:
    """It fuses what is between the matmuls, and rounds to BF16 less often there."""
    model = load_quantized(checkpoint("qwen3_moe"), "quark_mxfp4")
    compiled: Any = torch.compile(model, fullgraph=True)
    inputs = BY_NAME["qwen3_moe"].inputs()
    with torch.no_grad():
        want, got = logits(model, inputs), logits(compiled, inputs)
    assert float((got - want).norm() / want.norm()) < 0.02
