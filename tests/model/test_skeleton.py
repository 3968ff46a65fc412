"""Every linear and experts module gets a scheme or a reason, and what reads weights itself is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ALL, quantizable_modules
from quantload.checkpoint.index import read_index
from quantload.checkpoint.resolve import resolve
from quantload.errors import UnmatchedPatternError
from quantload.model.quantized import QuantizedLinear
from quantload.model.routes import CheckpointMap
from quantload.model.skeleton import Assignment, assign_schemes, find_model
from quantload.model.stored_sources import StoredSources
from quantload.options import LoadOptions, QuantizationPolicy
from quantload.schemes.opaque import OpaqueParameter
from quantload.schemes.policy import Policy
from quantload.schemes.registry import SchemeFactory
from quantload.schemes.stored.weights import StoredCheckpoint
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Checkpoint = Callable[[str], Path]


NOTHING_STORED = StoredSources(StoredCheckpoint("none", {}, {}), CheckpointMap(None, [], {}, [], [], set(), []))  # type: ignore[arg-type]


def rules(**values: Any) -> Policy:
    return Policy(QuantizationPolicy.from_mapping(values), SchemeFactory(torch.device("cpu"), LoadOptions()))


def skeleton(path: Path) -> tuple[PreTrainedModel, torch.dtype]:
    found = resolve(path)
    return find_model(found, trust_remote_code=False).build(read_index(found).tensors.values())


def assigned(path: Path, **values: Any) -> tuple[PreTrainedModel, dict[str, Assignment]]:
    model, dtype = skeleton(path)
    return model, {
        a.name: a for a in assign_schemes(model, rules(**values), dtype, strict=True, sources=NOTHING_STORED)
    }


@pytest.mark.parametrize("name", [a.name for a in ALL])
def test_everything_has_a_scheme_or_a_reason(name: str, checkpoint: Checkpoint) -> None:
    """On meta from end to end, and every module that is quantized stands where the old one stood."""
    expected = dict(quantizable_modules(skeleton(checkpoint(name))[0]))
    model, assignments = assigned(checkpoint(name))
    assert set(assignments) == set(expected)
    assert len(assignments) == len(expected)
    for path, assignment in assignments.items():
        assert (assignment.scheme is None) == bool(assignment.reason), path
        assert model.get_submodule(path) is assignment.module
        assert (getattr(assignment.module, "scheme", None) is None) == (assignment.scheme is None)
        if assignment.scheme is None:
            assert type(assignment.module) is type(expected[path]), path
    assert all(tensor.is_meta for tensor in model.parameters())


def test_nothing_is_touched_with_none(checkpoint: Checkpoint) -> None:
    plain = skeleton(checkpoint("qwen3_moe"))[0]
    model, assignments = assigned(checkpoint("qwen3_moe"), linear="none")
    assert str(model) == str(plain)
    assert {a.reason for a in assignments.values()} == {
        "output head", "none leaves linear layers as stored", "none leaves experts as stored",
    }  # fmt: skip


def test_weights_know_their_names_and_the_dtype_they_would_have_had(checkpoint: Checkpoint) -> None:
    plain, dtype = skeleton(checkpoint("t5"))
    model, assignments = assigned(checkpoint("t5"))
    assert {name for name, a in assignments.items() if a.scheme is not None} >= {
        name for name in assignments if name.endswith(".wo")
    }
    held = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if isinstance(parameter, OpaqueParameter):
            assert f"{parameter.module_name}.{parameter.key}" == name
            assert parameter.dtype == held[f"{parameter.module_name}.weight"].dtype == dtype


def test_a_layer_kept_in_float32_computes_in_float32_when_it_is_quantized(checkpoint: Checkpoint) -> None:
    """As T5's `wo` does in a float16 model: what casts activations to its dtype must do so."""
    plain, _ = skeleton(checkpoint("t5"))
    plain.to(torch.float16)
    made = assign_schemes(plain, rules(), torch.float16, strict=True, sources=NOTHING_STORED)
    dtypes = {a.name.rpartition(".")[2]: a.module.weight.dtype for a in made if a.scheme is not None}
    assert {name: dtype for name, dtype in dtypes.items() if dtype != torch.float16} == {"wo": torch.float32}


def test_tied_weights_are_kept(checkpoint: Checkpoint) -> None:
    _, assignments = assigned(checkpoint("llama_tied"), overrides={"lm_head": "quark_mxfp4"})
    assert assignments["lm_head"].scheme is None
    assert assignments["lm_head"].reason == "its weight is tied to another parameter"


def test_patterns_are_checked_against_the_model(checkpoint: Checkpoint) -> None:
    with pytest.raises(UnmatchedPatternError, match=r"layers\.9"):
        assigned(checkpoint("llama"), ignore=["model.layers.9.*"])


def test_a_conv1d_is_quantized_as_the_linear_it_is(checkpoint: Checkpoint) -> None:
    _, assignments = assigned(checkpoint("gpt2"))
    attention: Any = assignments["transformer.h.0.attn.c_attn"].module
    assert isinstance(attention, QuantizedLinear)
    assert (attention.in_features, attention.out_features, attention.transposed) == (64, 192, True)
    assert attention.weight.shape == (192, 32)


# Models written for this test


class Special(nn.Linear):
    """A linear layer that does something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(32, 32)
        self.read = nn.Linear(32, 32)
        self.asked = nn.Linear(32, 32)
        self.cast = nn.Linear(32, 32)
        self.checked = nn.Linear(32, 32)
        self.started = nn.Linear(32, 32)
        self.special = Special(32, 32)
        self.started.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) + nn.functional.linear(x, self.read.weight)
        x = self.asked(x.to(self.asked.weight.device))
        x = self.cast(x.to(self.cast.weight.dtype))
        if isinstance(self.checked.weight, Tensor):
            x = self.checked(x)
        out: Tensor = self.started(self.special(x))
        return out


class Inherits(Base):
    """Whose parent's forward runs."""


class Twice(nn.Module):
    """The same layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(self.second(x))
        return out


class Config(PretrainedConfig):  # type: ignore[misc]
    model_type = "written_for_a_test"


class Own(PreTrainedModel):  # type: ignore[misc]
    config_class = Config

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__(Config())
        self.block = block()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass


def decide(block: type[nn.Module]) -> dict[str, Assignment]:
    with torch.device("meta"):
        model = Own(block)
    return {
        a.name.removeprefix("block."): a
        for a in assign_schemes(model, rules(), torch.bfloat16, strict=True, sources=NOTHING_STORED)
    }


@pytest.mark.parametrize("block", [Base, Inherits])
def test_what_reads_a_weight_instead_of_calling_the_layer(block: type[nn.Module]) -> None:
    found = decide(block)
    assert found["read"].reason == f"the forward of {block.__name__} reads its weight instead of calling it"
    assert found["special"].reason == "Special is a linear layer with code of its own"
    assert {name for name, a in found.items() if a.scheme is not None} == {
        "called", "asked", "cast", "checked", "started",
    }  # fmt: skip


def test_a_module_under_two_names_is_decided_once() -> None:
    found = decide(Twice)
    assert list(found) == ["first"]
