"""The digest of a model: what it is made of, and what it does not depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, digest, load_quantized
from quantload.digest import model_digest
from quantload.errors import PolicyError
from quantload.kernels.arrangement import Arrangement
from quantload.memory.report import LoadReport
from quantload.schemes.linear import QuantizedLinearScheme
from safetensors.torch import save
from torch import Tensor, nn

Checkpoint = Callable[[str], Path]


def of(tensors: Mapping[str, Tensor]) -> str:
    """The digest of a module with these buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return model_digest(module, 2)[0]


def as_documented(tensors: Mapping[str, Tensor]) -> str:
    """By what the module's docstring says, from a safetensors file."""
    file = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    length = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    text = ""
    for name in sorted(header):
        if name != "__metadata__":
            begin, end = header[name]["data_offsets"]
            found = hashlib.sha256(data[begin:end]).hexdigest()
            shape = ",".join(map(str, header[name]["shape"]))
            text += f'[{json.dumps(name)},"{header[name]["dtype"]}",[{shape}],"{found}"]\n'
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_it_is_what_the_documentation_says(checkpoint: Checkpoint, name: str) -> None:
    for scheme in ("quark_mxfp4", "fp8_per_channel", "int4_per_group"):
        model = load_quantized(checkpoint(name), scheme, options=LoadOptions(digest=True))
        assert model.load_report.digest == as_documented(model.state_dict())
        assert model.load_report.digest_seconds is not None


BASE = {"a": torch.arange(12.0).view(3, 4), "b": torch.zeros(2, dtype=torch.int8)}


def test_a_known_digest_is_the_same_on_every_machine() -> None:
    assert of(BASE) == as_documented(BASE)
    assert of(BASE) == "sha256:d6b6d93d1350348dd9610e0dea86a3e7eb00650fcc28f2c52b60053a84b4bb31"


@pytest.mark.parametrize(
    "other",
    [
        {**BASE, "a": BASE["a"].view(4, 3)},
        {**BASE, "b": BASE["b"].view(torch.uint8)},
        {**BASE, "a": BASE["a"] + torch.tensor([0.0, 0, 0, 1e-6])},
        {"a": BASE["a"], "c": BASE["b"]},
        {"a": BASE["a"]},
        {"a": BASE["a"].view(torch.int32), "b": BASE["b"]},
    ],
)
def test_every_difference_gives_another(other: dict[str, Tensor]) -> None:
    assert of(other) == as_documented(other) != of(BASE)


def test_memory_layout_order_sharing_and_threads_have_no_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(5, 7, 11).bfloat16()
    tensors = {"x": tensor, "y": tensor.clone(), "e": torch.empty(0, 3), "f": torch.empty(0, 3), "s": torch.tensor(3)}
    want = as_documented(tensors)
    assert of(tensors) == want
    assert of(dict(reversed(tensors.items()))) == want
    assert of(tensors | {"y": tensor}) == want  # one tensor with two names
    strided = torch.empty(11, 7, 5, dtype=torch.bfloat16).permute(2, 1, 0).copy_(tensor)
    assert not strided.is_contiguous()
    for chunk in (1 << 20, 100, 8, 2):
        monkeypatch.setattr(digest, "CHUNK_BYTES", chunk)
        assert of(tensors | {"x": strided}) == want
    assert of(tensors | {"x": torch.stack([tensor, tensor])[1]}) == want
    module = nn.Module()
    for name, value in tensors.items():
        module.register_buffer(name, value)
    assert {model_digest(module, workers)[0] for workers in (1, 2, 9)} == {want}


def test_names_may_be_any_text() -> None:
    tensors = {'quo"te\n': torch.ones(1), "größe": torch.ones(2), "\U0001d518": torch.ones(3), "\ufb01": torch.ones(4)}
    module = nn.Module()
    module._buffers.update(tensors)
    text = "".join(
        json.dumps([name, "F32", [len(value)], hashlib.sha256(value.numpy().tobytes()).hexdigest()],
                   separators=(",", ":"), ensure_ascii=False) + "\n"
        for name, value in sorted(tensors.items())
    )  # fmt: skip
    assert model_digest(module, 1)[0] == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_tied_parameters_count_under_both_names(checkpoint: Checkpoint) -> None:
    model = load_quantized(checkpoint("gpt2"), options=LoadOptions(digest=True))
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    assert model_digest(model, 1)[0] == model.load_report.digest


def test_a_cached_load_has_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = LoadOptions(digest=True, cache=tmp_path)
    reports = [load_quantized(checkpoint("qwen3_moe"), "quark_int4fp8_moe", options=options).load_report for _ in "12"]
    assert [report.cache for report in reports] == ["written", "hit"]
    assert reports[0].digest == reports[1].digest
    saved = LoadReport.from_dict(reports[0].to_dict())
    assert (saved.digest, saved.digest_seconds) == (reports[0].digest, reports[0].digest_seconds)
    assert load_quantized(checkpoint("qwen3_moe")).load_report.digest is None


def _turned(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.flip(-1) for tensor in tensors)


def _turn(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.flip(-1))


def test_codes_that_a_kernel_keeps_elsewhere_count_where_they_belong(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that wants padded rows, and every row backwards."""
    options = LoadOptions(digest=True)
    path, policy = checkpoint("llama"), QuantizationPolicy(ignore=("*.down_proj",))
    plain = load_quantized(path, "quark_mxfp4", options=options, policy=policy)
    arrangement = Arrangement((96, 1), _turn, _turned)

    def arranged(scheme: QuantizedLinearScheme, layer: Any) -> Arrangement:
        return arrangement

    monkeypatch.setattr(QuantizedLinearScheme, "arrangement", arranged)
    other = load_quantized(path, "quark_mxfp4", options=options, policy=policy)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert plain.state_dict()[name].shape != other.state_dict()[name].shape
    assert other.load_report.digest == plain.load_report.digest


def test_a_conversion_has_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="digest is for a loaded model"):
        convert_checkpoint(checkpoint("llama"), tmp_path / "out", options=LoadOptions(digest=True))
