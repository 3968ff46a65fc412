"""Every conversion transformers knows, on coordinates: it moves what it moves on data, or says that it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from quantload.model import transformers_api
from quantload.model.coordinates import Coordinates, NotExpressible
from quantload.model.transformers_api import Conversion
from torch import Tensor
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter

SHAPES = [(12, 24), (4, 12, 24), (12,), (12, 2, 3, 2, 2), (12, 4, 2, 2)]
"""One of them fits every conversion of tensors of one shape: dimensions that can be halved, cut in three, and permuted
for two heads."""

OWN_SHAPES = {
    # Codes, two to a byte, with a scale for 16 values, and the two parts of a factor per expert.
    "Inkling2LoopDequantizeExperts": [(4, 8, 16), (4, 8, 2), (4,), (1,)],
}
"""By the first operation: the shapes of each source, where they have to differ."""


class Anything:
    """A config that has two attention heads, four of everything else, and itself as every sub-config."""

    num_attention_heads = 2

    def get_text_config(self) -> Anything:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self if name.endswith("config") else 4


@dataclass
class Model:
    """What an operation asks of a model."""

    shape: tuple[int, ...]
    targets: int

    @property
    def config(self) -> Anything:
        return Anything()

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty([size // self.targets for size in self.shape], device="meta")

    get_parameter_or_buffer = get_parameter


def converters() -> Iterator[tuple[str, WeightConverter]]:
    for key, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for number, transform in enumerate(transforms):
            if isinstance(transform, WeightConverter):
                yield f"{key}-{number}", transform


def operation_names(converter: WeightConverter) -> tuple[str, ...]:
    return tuple(type(operation).__name__ for operation in converter.operations)


def shapes(converter: WeightConverter) -> list[list[tuple[int, ...]]]:
    """The shapes to try, by source pattern."""
    own = OWN_SHAPES.get(operation_names(converter)[0])
    return [own] if own is not None else [[shape] * len(converter.source_patterns) for shape in SHAPES]


def sources(
    converter: WeightConverter, shapes: list[tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Checkpoint tensors without two equal elements, and their names by source pattern."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    at = 0
    for pattern, shape in zip(converter.source_patterns, shapes, strict=True):
        names[pattern] = [f"{pattern}#{i}" for i in range(4 if "*" in pattern else 1)]
        for name in names[pattern]:
            count = torch.Size(shape).numel()
            tensors[name] = torch.arange(at, at + count, dtype=torch.float32).reshape(shape)
            at += count
    return tensors, names


def run(converter: WeightConverter, names: dict[str, list[str]], tensors: dict[str, Any]) -> dict[str, Any]:
    shape = next(iter(tensors.values())).shape
    model: Any = Model(tuple(shape), len(converter.target_patterns))
    conversion = Conversion(converter.target_patterns[0], converter, {k: list(v) for k, v in names.items()})
    return transformers_api.convert(model, conversion, tensors)


def gather(moved: Coordinates, tensors: dict[str, Tensor]) -> Tensor:
    """The data that coordinates stand for."""
    sources = list(tensors.values())
    with torch._C.DisableTorchFunctionSubclass():
        out = torch.full(tuple(moved.shape), -1.0)
    for box in moved.boxes:
        values = torch.as_strided(sources[box.source].flatten(), box.shape, box.strides, box.offset)
        out[tuple(slice(start, start + size) for start, size in zip(box.start, box.shape, strict=True))] = values
    return out


def computes(made: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    """Whether there is anything among what was made that is no element of what it was made of."""
    return not torch.isin(
        torch.cat([x.flatten() for x in made.values()]), torch.cat([*map(Tensor.flatten, tensors.values())])
    ).all()


def check(converter: WeightConverter, label: str = "") -> bool:
    """Compare data and coordinates for every shape the conversion takes; whether there was one.

    Coordinates can express all that moves elements, and never what computes: that is carried out on whole tensors.
    """
    fits = False
    for shape in shapes(converter):
        tensors, names = sources(converter, shape)
        try:
            want = run(converter, names, dict(tensors))
        except (ValueError, RuntimeError, IndexError):
            continue
        if not all(isinstance(value, Tensor) for value in want.values()):
            continue
        fits = True
        identities = {n: Coordinates.of(i, t.shape, t.dtype) for i, (n, t) in enumerate(tensors.items())}
        if computes(want, tensors):
            with pytest.raises(NotExpressible):
                run(converter, names, identities)
            continue
        moved = run(converter, names, identities)
        assert moved.keys() == want.keys(), label
        for name, value in want.items():
            assert torch.equal(gather(moved[name], tensors), value), (label, shape, name)
    return fits


def test_every_converter_of_every_model_type_moves_elements_or_is_carried_out_whole() -> None:
    not_expressible, never_ran, count = [], [], 0
    for label, converter in converters():
        count += 1
        try:
            if not check(converter, label):
                never_ran.append((label, operation_names(converter)))
        except NotExpressible as error:
            not_expressible.append((label, operation_names(converter), str(error)))
    assert count > 100
    assert not_expressible == []
    assert never_ran == []


def operation(name: str, *args: Any, **kwargs: Any) -> Any:
    made = getattr(core_model_loading, name, None)
    if made is None:
        pytest.skip(f"this transformers has no {name}")
    return made(*args, **kwargs)


ONE_TO_ONE = [
    ("Transpose", {"dim0": 0, "dim1": 1}),
    ("Interleave", {"dim": 0}),
    ("Interleave", {"dim": 0, "inverse": True}),
    ("Interleave", {"dim": 1}),
    ("PermuteForRope", {"permute_layer_names": ["a"]}),
    ("PermuteForRope", {"permute_layer_names": ["a"], "inverse": True}),
    ("Conv3dToLinear", {"in_channels": 2, "kernel_size": (3, 2, 2)}),
    ("LinearToConv3d", {"in_channels": 2, "kernel_size": (3, 2, 2)}),
]


@pytest.mark.parametrize(("name", "options"), ONE_TO_ONE)
def test_operations_on_one_tensor(name: str, options: dict[str, Any]) -> None:
    converter = WeightConverter(["a"], ["b"], operations=[operation(name, **options)])
    assert check(converter)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("targets", [2, 3])
@pytest.mark.parametrize("name", ["Chunk", "Split"])
def test_operations_that_cut(name: str, targets: int, dim: int) -> None:
    converter = WeightConverter(["a"], [f"b{i}" for i in range(targets)], operations=[operation(name, dim=dim)])
    assert check(converter)


@pytest.mark.parametrize("dim", [0, 1])
def test_operations_that_join(dim: int) -> None:
    assert check(WeightConverter(["a", "b", "c"], ["d"], operations=[operation("Concatenate", dim=dim)]))
    assert check(WeightConverter(["a.*.w"], ["b"], operations=[operation("MergeModulelist", dim=dim)]))
    both = [operation("MergeModulelist", dim=0), operation("Concatenate", dim=dim)]
    assert check(WeightConverter(["a.*.w", "b.*.w"], ["c"], operations=both))


@pytest.mark.parametrize("name", ["ErnieFuseAndSplitTextVisionExperts"])
def test_operations_from_many_to_many(name: str) -> None:
    assert check(WeightConverter(["a.*.w", "b.*.w"], ["c", "d"], operations=[operation(name)]))


def test_arithmetic_is_not_expressible() -> None:
    class Halve(core_model_loading.ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
            return {target_patterns[0]: next(iter(input_dict.values()))[0] / 2}

    converter = WeightConverter(["a"], ["b"], operations=[Halve()])
    with pytest.raises(NotExpressible):
        run(converter, {"a": ["a"]}, {"a": Coordinates.of(0, (4, 8), torch.float32)})
    assert check(converter)
