"""Checkpoint names to regions: complete, exact, and every mismatch named before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ALL
from quantload.checkpoint.headers import TensorEntry
from quantload.checkpoint.index import read_index
from quantload.checkpoint.resolve import resolve
from quantload.errors import MissingWeightsError, ShapeMismatchError, UnexpectedWeightsError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.spans import Landing
from quantload.kernels.formats import FP8_BLOCK, MXFP4
from quantload.model.coordinates import Coordinates
from quantload.model.routes import CheckpointMap, LandingOf, build_routes, map_checkpoint
from quantload.model.skeleton import find_model
from quantload.model.transformers_api import Conversion
from transformers import PreTrainedModel

Checkpoint = Callable[[str], Path]
Entries = dict[str, TensorEntry]
UP = "model.layers.1.mlp.experts.{}.up_proj.weight"


def open_checkpoint(path: Path) -> tuple[PreTrainedModel, Entries]:
    """The meta model of a checkpoint, and what its headers say."""
    found = resolve(path)
    index = read_index(found)
    model, _ = find_model(found, trust_remote_code=False).build(index.tensors.values())
    return model, dict(index.tensors)


@pytest.fixture
def qwen3_moe(checkpoint: Checkpoint) -> tuple[PreTrainedModel, Entries]:
    return open_checkpoint(checkpoint("qwen3_moe"))


def flat_landing(mapped: CheckpointMap) -> LandingOf:
    """Every parameter kept as stored."""

    def landing(parameter: str) -> Landing:
        shape = mapped.shapes.tensors[parameter].shape
        columns = int(shape[-1]) if len(shape) else 1
        return Landing(None, shape.numel() // columns, columns)

    return landing


@pytest.mark.parametrize("name", [a.name for a in ALL])
def test_every_element_of_every_parameter_has_one_source(name: str, checkpoint: Checkpoint) -> None:
    """Spans cover each parameter once, and each checkpoint tensor is used up."""
    model, entries = open_checkpoint(checkpoint(name))
    mapped = map_checkpoint(model, entries)
    assert mapped.not_expressible == []
    routes = build_routes(mapped, flat_landing(mapped))
    assert routes.whole == []
    landing = flat_landing(mapped)
    covered: dict[str, torch.Tensor] = {}
    for source, spans in routes.spans.items():
        taken = torch.zeros(torch.Size(entries[source].shape).numel(), dtype=torch.int)
        for span in spans:
            (top, bottom), (left, right) = span.region.rows, span.region.columns
            shape, strides = (bottom - top, right - left), (span.row_stride, span.column_stride)
            taken.as_strided(shape, strides, span.offset).add_(1)
            where = landing(span.parameter)
            canvas = covered.setdefault(span.parameter, torch.zeros(where.rows, where.columns, dtype=torch.int))
            canvas[top:bottom, left:right] += 1
        assert (taken == 1).all(), source
    expected = set(mapped.shapes.tensors) - mapped.missing
    assert set(covered) == {n for n in expected if mapped.shapes.tensors[n].numel()}
    for parameter, canvas in covered.items():
        assert (canvas == 1).all(), parameter
    assert set(routes.spans) | set(mapped.ignored) == {n for n, entry in entries.items() if entry.nbytes}


# What does not match


def test_a_missing_parameter_is_named(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    del entries["model.layers.0.self_attn.q_proj.weight"], entries["model.norm.weight"]
    with pytest.raises(MissingWeightsError) as caught:
        map_checkpoint(model, entries)
    message = str(caught.value)
    assert message.startswith("2 parameters of Qwen3MoeForCausalLM have no tensor in the checkpoint: ")
    assert "model.layers.0.self_attn.q_proj.weight, model.norm.weight" in message


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_missing_expert_is_named(expert: int, qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    del entries[UP.format(expert)]
    with pytest.raises(
        MissingWeightsError, match=f"gate_up_proj needs 1 more checkpoint tensors: {UP.format(expert)};"
    ):
        map_checkpoint(model, entries)


def test_every_expert_missing_of_one_half(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    for expert in range(4):
        del entries[UP.format(expert)]
    with pytest.raises(MissingWeightsError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj .*up_proj"):
        map_checkpoint(model, entries)


def test_all_but_one_expert_missing(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    """With one name left of each half there is no telling which number in it counts experts."""
    model, entries = qwen3_moe
    for name in list(entries):
        if ".layers.1.mlp.experts." in name and ".experts.0." not in name:
            del entries[name]
    with pytest.raises((MissingWeightsError, ShapeMismatchError), match=r"model\.layers\.1\.mlp\.experts\."):
        map_checkpoint(model, entries)


def test_a_surplus_expert_is_named(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    for projection in ("gate_proj", "up_proj", "down_proj"):
        like = entries[f"model.layers.1.mlp.experts.0.{projection}.weight"]
        name = f"model.layers.1.mlp.experts.4.{projection}.weight"
        entries[name] = like._replace(name=name)
    with pytest.raises(UnexpectedWeightsError, match=r"has 4 experts, the checkpoint has more: .*experts\.4\."):
        map_checkpoint(model, entries)


def test_an_unexpected_tensor_is_named(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    entries["model.layers.7.mlp.gate.weight"] = entries["model.layers.1.mlp.gate.weight"]
    left = map_checkpoint(model, entries).leftovers
    assert left.unexpected == ("model.layers.7.mlp.gate.weight",)
    assert left.unexpected_bytes == entries["model.layers.1.mlp.gate.weight"].nbytes
    with pytest.raises(UnexpectedWeightsError, match=r"1 checkpoint tensors .*Qwen3MoeFor.*layers\.7\.mlp\.gate"):
        left.check(strict=True)


def test_many_names_are_cut_short(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    for number in range(12):
        entries[f"model.extra.{number:02}"] = entries["model.norm.weight"]
    with pytest.raises(UnexpectedWeightsError, match=r"12 checkpoint .*extra\.00.*extra\.07 and 4 more;"):
        map_checkpoint(model, entries).leftovers.check(strict=True)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm.weight", (65,), r"model\.norm\.weight: the checkpoint gives shape \(65,\) .* has \(64,\)"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 32), r"q_proj\.weight: .*\(64, 32\)"),
        (UP.format(1), (32, 32), r"gate_up_proj cannot be made from"),
        (UP.format(1), (64, 32), r"gate_up_proj cannot be made from"),
    ],
)
def test_another_shape_is_named(
    name: str, shape: tuple[int, ...], message: str, qwen3_moe: tuple[PreTrainedModel, Entries]
) -> None:
    model, entries = qwen3_moe
    entries[name] = entries[name]._replace(shape=shape)
    with pytest.raises(ShapeMismatchError, match=message):
        map_checkpoint(model, entries)


def test_experts_all_of_another_shape(qwen3_moe: tuple[PreTrainedModel, Entries]) -> None:
    model, entries = qwen3_moe
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        entries[name] = entries[name]._replace(shape=(32, 64))
    with pytest.raises(ShapeMismatchError, match=r"gives shape \(4, 32, 64\) .* the model has \(4, 64, 32\)"):
        map_checkpoint(model, entries)


def test_what_the_class_allows_to_be_missing_or_surplus_is_no_error(checkpoint: Checkpoint) -> None:
    model, entries = open_checkpoint(checkpoint("llama_tied"))
    assert "lm_head.weight" not in entries
    inv_freq = entries["model.norm.weight"]._replace(name="model.layers.0.self_attn.rotary_emb.inv_freq")
    mapped = map_checkpoint(model, {**entries, inv_freq.name: inv_freq})
    assert mapped.ignored == [inv_freq.name]
    assert mapped.missing == {"lm_head.weight"}
    assert (mapped.leftovers.unexpected, mapped.leftovers.ignored) == ((), (inv_freq.name,))


# Spans


def one(coordinates: Coordinates, landing: Landing) -> tuple[list[Any], list[Any]]:
    """Spans of one parameter `p`, sorted, and whole conversions."""
    conversion = Conversion("p", None, {name: [name] for name in ("t", "u")})
    mapped = CheckpointMap(None, [], {"p": (coordinates, conversion)}, [], [], set(), [])  # type: ignore[arg-type]
    routes = build_routes(mapped, lambda _: landing)
    spans = [
        (source, span.region.expert, span.region.rows, span.region.columns, span.offset, span.row_stride)
        for source, found in routes.spans.items()
        for span in found
    ]
    return sorted(spans, key=str), routes.whole


def test_spans_are_cut_at_shard_borders_and_experts() -> None:
    layout = WeightLayout(FP8_BLOCK, 2, (("w1", 3), ("w3", 3)), 8)
    spans, whole = one(Coordinates.of(0, (2, 6, 8), torch.float32), Landing(2, 6, 8, layout=layout))
    assert whole == []
    assert spans == [
        ("t", 0, (0, 3), (0, 8), 0, 8),
        ("t", 0, (3, 6), (0, 8), 24, 8),
        ("t", 1, (0, 3), (0, 8), 48, 8),
        ("t", 1, (3, 6), (0, 8), 72, 8),
    ]


def test_a_transposed_landing_turns_its_spans() -> None:
    layout = WeightLayout(FP8_BLOCK, None, (("", 4),), 6)
    spans, _ = one(Coordinates.of(0, (6, 4), torch.float32), Landing(None, 4, 6, True, layout))
    assert spans == [("t", None, (0, 4), (0, 6), 0, 1)]


def test_a_span_through_a_byte_of_codes_makes_its_conversion_whole() -> None:
    parts = [Coordinates.of(0, (4, 16), torch.float32), Coordinates.of(1, (4, 48), torch.float32)]
    joined: Any = torch.cat(parts, dim=1)  # type: ignore[arg-type]
    layout = WeightLayout(MXFP4, None, (("", 4),), 64)
    spans, whole = one(joined, Landing(None, 4, 64, layout=layout))
    assert spans == []
    assert len(whole) == 1
    bytewise = WeightLayout(FP8_BLOCK, None, (("", 4),), 64)
    spans, whole = one(joined, Landing(None, 4, 64, layout=bytewise))
    assert [(source, columns) for source, _, _, columns, _, _ in spans] == [("t", (0, 16)), ("u", (16, 64))]
    assert whole == []


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_what_is_kept_lands_in_two_dimensions(shape: tuple[int, ...]) -> None:
    columns = shape[-1] if shape else 1
    rows = torch.Size(shape).numel() // columns
    spans, _ = one(Coordinates.of(0, shape, torch.float32), Landing(None, rows, columns))
    ((source, expert, found_rows, found_columns, offset, stride),) = spans
    assert (source, expert, found_rows, found_columns, offset) == ("t", None, (0, rows), (0, columns), 0)
    assert rows == 1 or stride == columns
