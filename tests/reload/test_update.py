"""New weights handed over tensor by tensor: in any order, in parts, some of them, some of them twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from new_weights import changed_copy, check_facts, different, load, other_values, pointers
from quantload import LoadOptions, reload_weights
from quantload.checkpoint.files import FolderFiles
from quantload.checkpoint.source import Source
from quantload.errors import (
    CheckpointError,
    IncompleteModelError,
    MissingWeightsError,
    NonFiniteWeightError,
    PolicyError,
    QuantloadError,
    RepeatedRegionError,
    ShapeMismatchError,
    UnexpectedWeightsError,
    UnsupportedCheckpointError,
)
from quantload.reload.update import WeightUpdate
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file
from torch import Tensor

Checkpoints = Callable[[str], Path]
Part = tuple[str, Tensor, tuple[int, ...]]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def shuffled(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    names = list(tensors)
    random.Random(seed).shuffle(names)
    return {name: tensors[name] for name in names}


def in_parts(tensors: dict[str, Tensor], rng: random.Random) -> Iterator[Part]:
    """Parts of all tensors, cut along one dimension of each, one after the other in any order."""
    parts: list[Part] = []
    for name, tensor in tensors.items():
        dim = rng.randrange(max(tensor.dim(), 1))
        extent = tensor.shape[dim] if tensor.dim() else 1
        cuts = sorted({0, extent, *(rng.randrange(extent + 1) for _ in range(2))}) if tensor.dim() else [0, 1]
        for low, high in itertools.pairwise(cuts):
            start = [0] * tensor.dim()
            if tensor.dim():
                start[dim] = low
            parts.append((name, tensor.narrow(dim, low, high - low) if tensor.dim() else tensor, tuple(start)))
    rng.shuffle(parts)
    yield from parts


def passing(given: Any) -> Iterator[Any]:
    """One pass over tensors that are overwritten when the next is asked for."""
    for name, tensor, *start in given:
        lent = tensor.clone()
        yield name, lent, *start
        lent.fill_(torch.nan if lent.is_floating_point() else 0)


WAYS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "mapping": shuffled,
    "iterator": lambda tensors: passing(shuffled(tensors).items()),
    "parts": lambda tensors: passing(in_parts(tensors, random.Random(1))),
    "parts, twice": lambda tensors: list(in_parts(tensors, random.Random(2))),
}


def check_every_way(folders: tuple[Path, Path], scheme: str) -> None:
    """To and fro between two checkpoints, each time in another way."""
    fresh = [load(folder, scheme) for folder in folders]
    model = load(folders[0], scheme)
    where = pointers(model)
    for number, give in enumerate([None, *WAYS.values()], 1):
        folder, its = folders[number % 2], fresh[number % 2]
        report = reload_weights(model, folder if give is None else give(tensors_of(folder)), progress=False)
        assert different(model, its) == []
        assert pointers(model) == where
        check_facts(report, its.load_report)
        assert model.load_report is report


@pytest.mark.parametrize(("architecture", "scheme"), [("gpt_oss", "fp8_per_tensor"), ("llama", "nvfp4")])
def test_tensors_in_any_order_are_a_fresh_load(
    checkpoint: Checkpoints, tmp_path: Path, architecture: str, scheme: str
) -> None:
    check_every_way((checkpoint(architecture), changed_copy(checkpoint(architecture), tmp_path / "new")), scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [entry.name for entry in ENTRIES])
@pytest.mark.parametrize("architecture", sorted(architectures.BY_NAME))
def test_every_scheme_and_architecture_takes_new_weights(
    checkpoint: Checkpoints, tmp_path: Path, architecture: str, scheme: str
) -> None:
    check_every_way((checkpoint(architecture), changed_copy(checkpoint(architecture), tmp_path / "new")), scheme)


def test_a_partial_update_by_name_leaves_the_rest(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe")

    def some_changed(name: str, tensor: Tensor) -> Tensor:
        return other_values(name, tensor) if name in chosen else tensor

    chosen = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.norm.weight",
    ]
    new = changed_copy(folder, tmp_path / "new", some_changed)
    model, fresh = load(folder), load(new)
    old = model.load_report
    report = reload_weights(model, {name: tensors_of(new)[name] for name in chosen}, partial=True)
    assert different(model, fresh) == []
    changed = {mine.name for mine, before in zip(report.layers, old.layers, strict=True) if mine != before}
    assert changed == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts"}
    experts = next(layer for layer in report.layers if layer.name == "model.layers.1.mlp.experts")
    assert (experts.sqnr_db, experts.amax) == (None, None)  # nobody has seen all of its weights
    q_proj, its = (
        next(layer for layer in found.layers if layer.name.endswith("0.self_attn.q_proj"))
        for found in (report, fresh.load_report)
    )
    assert q_proj == its
    assert report.state == "complete"


def test_a_partial_update_from_a_folder_takes_what_is_there(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = checkpoint("llama")
    new = changed_copy(folder, tmp_path / "new")
    model, fresh = load(folder), load(new)
    tensors = tensors_of(new)
    for number in range(2):
        part = changed_copy(folder, tmp_path / f"part{number}")
        save_file(dict(list(shuffled(tensors).items())[number::2]), part / "model.safetensors", {"format": "pt"})
        reload_weights(model, part, partial=True)
    assert different(model, fresh) == []


def test_a_folder_is_read_with_the_retries_of_the_load(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint("llama"), options=LoadOptions(retries=7))
    source, retries = FolderFiles.source, list[int | None]()

    def noted(files: FolderFiles, options: LoadOptions | None = None) -> Source:
        retries.append(None if options is None else options.retries)
        return source(files, options)

    monkeypatch.setattr(FolderFiles, "source", noted)
    reload_weights(model, checkpoint("llama"), partial=True, progress=False)
    assert retries[-1] == 7  # behind that of the headers


def test_names_that_come_again_are_replaced(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe")
    new = changed_copy(folder, tmp_path / "new")
    for scheme, again in (("quark_mxfp4", 3), ("nvfp4", 1)):
        model, fresh = load(folder, scheme), load(new, scheme)
        old, tensors = shuffled(tensors_of(folder)), shuffled(tensors_of(new))
        for lists in ([*list(old.items())[::again], *tensors.items()],):
            with WeightUpdate(model) as update:
                update.load(iter(lists))
                update.finish()
            assert different(model, fresh) == []
            with WeightUpdate(model) as update:
                update.load(lists)
                update.finish()
            assert different(model, fresh) == []


def test_scales_that_tensors_share_may_come_in_several_calls(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    new = changed_copy(folder, tmp_path / "new")
    model, fresh = load(folder, "nvfp4"), load(new, "nvfp4")
    with WeightUpdate(model) as update:
        for item in shuffled(tensors_of(new)).items():
            update.load([item])
        update.finish()
    assert different(model, fresh) == []


def test_finish_names_what_has_not_come(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    tensors, name = tensors_of(folder), "model.layers.1.self_attn.k_proj.weight"
    rest = {each: tensor for each, tensor in tensors.items() if each != name}
    model = load(folder, "nvfp4")
    with pytest.raises(MissingWeightsError, match=r"what has one scale with model\.layers\.1\.self_attn\.k_proj"):
        reload_weights(model, {name: tensors[name]}, partial=True)
    model = load(folder)
    with pytest.raises(MissingWeightsError, match=r"1 tensors of a full update did not come: .*1\.self_attn\.k_proj"):
        reload_weights(model, rest)
    with pytest.raises(MissingWeightsError, match=rf"the rest of {name} is missing"):
        reload_weights(model, [(name, tensors[name][:8], (0, 0))], partial=True)
    with pytest.raises(IncompleteModelError, match="an update failed: 1 tensors did not come whole"):
        model(**architectures.BY_NAME["llama"].inputs())


def test_a_partial_update_repairs_what_a_failed_one_has_left(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    new = changed_copy(folder, tmp_path / "new")
    tensors, names = tensors_of(new), [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
    bad = {name: tensors[name].clone() for name in names}
    bad[names[1]][5, 7] = torch.inf
    model, fresh = load(folder), load(folder)
    with pytest.raises(NonFiniteWeightError, match=rf"{names[1]} is not finite at index \[5, 7\]"):
        reload_weights(model, bad, partial=True)
    reload_weights(model, {names[0]: tensors[names[0]]}, partial=True)
    assert model.load_report.state == "incomplete"
    with pytest.raises(IncompleteModelError, match=rf"did not bring {names[1]}"):
        model(**architectures.BY_NAME["llama"].inputs())
    reload_weights(model, {names[1]: tensors[names[1]]}, partial=True)
    assert model.load_report.state == "complete"
    reload_weights(fresh, {name: tensors[name] for name in names}, partial=True)
    assert different(model, fresh) == []


def test_an_update_that_is_given_up(checkpoint: Checkpoints) -> None:
    model = load(checkpoint("llama"))
    with WeightUpdate(model), pytest.raises(PolicyError, match="is being reloaded already"):
        reload_weights(model, checkpoint("llama"))
    assert model.load_report.state == "complete"  # as nothing had come
    with WeightUpdate(model) as update:
        update.load(list(tensors_of(checkpoint("llama")).items())[:2])
        assert model.load_report.state == "incomplete"
    with pytest.raises(IncompleteModelError, match="given up before it was finished"):
        model(**architectures.BY_NAME["llama"].inputs())
    reload_weights(model, tensors_of(checkpoint("llama")))
    assert model.load_report.state == "complete"


def test_names_of_parameters_are_understood_too(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """As a trainer has them, who runs the model of transformers: experts in one tensor."""
    new = changed_copy(checkpoint("qwen3_moe"), tmp_path / "new")
    trained: Any = architectures.reference(new, architectures.BY_NAME["qwen3_moe"])
    for scheme in ("quark_mxfp4", "nvfp4"):
        model, fresh = load(checkpoint("qwen3_moe"), scheme), load(new, scheme)
        assert "model.layers.0.mlp.experts.gate_up_proj" in trained.state_dict()
        reload_weights(model, trained.state_dict())
        assert different(model, fresh) == []


def test_tied_weights_may_come_once_or_twice(checkpoint: Checkpoints, tmp_path: Path) -> None:
    new = changed_copy(checkpoint("llama_tied"), tmp_path / "new")
    model, fresh, tensors = load(checkpoint("llama_tied")), load(new), tensors_of(new)
    values = tensors.pop("model.embed_tokens.weight")
    for names in (("model.embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens"), ("lm_head",)):
        reload_weights(model, {**tensors, **{f"{name}.weight": values for name in names}})
        assert different(model, fresh) == []
    with pytest.raises(CheckpointError, match=r"are one tensor in the model"):
        reload_weights(model, {**tensors, "lm_head.weight": values, "model.embed_tokens.weight": values * 2})


Wrong = tuple[str, Callable[[Tensor], Any], type[QuantloadError], str]
WRONG: list[Wrong] = [
    ("model.nothing.weight", lambda x: (x,), UnexpectedWeightsError, "neither a tensor of the checkpoint"),
    ("model.norm.weight", lambda x: (x,), ShapeMismatchError, r"got a tensor of shape \(64, 64\), \(64,\) is expected"),
    ("lm_head.weight", lambda x: (x, (150, 0)), ShapeMismatchError, r"at \(150, 0\) lies outside of"),
    ("lm_head.weight", lambda x: (x.double()[:1], (0, 0)), UnsupportedCheckpointError, "float64"),
    ("model.layers.0.self_attn.q_proj.weight", lambda x: (x.char(),), QuantloadError, "int8"),
]


@pytest.mark.parametrize(("name", "given", "error", "match"), WRONG)
def test_what_cannot_be_taken_is_refused_before_it_is_written(
    checkpoint: Checkpoints, name: str, given: Callable[[Tensor], Any], error: type[QuantloadError], match: str
) -> None:
    model, fresh = load(checkpoint("llama")), load(checkpoint("llama"))
    values = tensors_of(checkpoint("llama"))["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(error, match=match):
        reload_weights(model, [(name, *given(values))], partial=True)
    assert model.load_report.state == "complete"
    assert different(model, fresh) == []


def test_parts_that_overlap_are_an_error(checkpoint: Checkpoints) -> None:
    name, tensors = "model.layers.0.mlp.up_proj.weight", tensors_of(checkpoint("llama"))
    for cut in ((slice(0, 16), slice(None)), (slice(None), slice(0, 16))):
        model = load(checkpoint("llama"))
        part = (name, tensors[name][cut], (0, 0))
        with pytest.raises(RepeatedRegionError):
            reload_weights(model, iter([part, part]), partial=True)


def test_a_model_that_keeps_stored_codes_takes_no_values(checkpoint: Checkpoints, golden: Path) -> None:
    folder = next(
        path.parent for path in sorted(golden.rglob("config.json")) if "quantization_config" in path.read_text()
    )
    model = load(folder, "auto")
    with pytest.raises(PolicyError, match="reload it from a checkpoint like that one"):
        reload_weights(model, {})
    where, fresh = pointers(model), load(folder, "auto")
    reload_weights(model, folder, progress=False)
    assert pointers(model) == where
    assert different(model, fresh) == []
