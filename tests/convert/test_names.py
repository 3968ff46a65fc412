"""Each tool takes for quantized what is quantized, and as what it is, by whichever names it knows the modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import reader_rules
import renamed_architectures
import torch
from quantload import LoadOptions, QuantizationPolicy
from quantload.checkpoint.headers import TensorEntry
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.working_memory import CPU
from quantload.convert.names import name_modules
from quantload.convert.tensors import KeptTensor, QuantizedTensor, plan_tensors
from quantload.draft import Draft, draft_load
from quantload.errors import PolicyError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import FORMATS
from quantload.model.routes import Routes
from quantload.model.skeleton import Assignment
from quantload.online.storage import FinalStorage
from quantload.plan import plan_without_pieces
from quantload.schemes.exported.registry import EXPORT_FORMATS
from quantload.schemes.exported.weights import NamedModules
from torch import nn

TOWERS = ("*vision*", "*visual*", "*audio_tower*")
POLICIES = {
    "default": QuantizationPolicy(linear="fp8_per_channel"),
    "towers kept": QuantizationPolicy(linear="fp8_per_channel", ignore=TOWERS),
    "several formats": QuantizationPolicy(
        linear="fp8_per_channel",
        overrides=(("*layers.1.*q_proj", "none"), ("*layers.1*mlp*", "int8_per_channel"), ("*lm_head", "quark_mxfp4")),
    ),
    "NVFP4, towers kept": QuantizationPolicy(linear="nvfp4", ignore=TOWERS),
}
FP8 = [*POLICIES][:3]
QUICK = ("llava", "qwen2_vl", "gemma3", "mistral3", "paligemma", "mllama", "qwen2_audio", "mixtral")
SLOW = [each.name for each in renamed_architectures.ALL if each.name not in QUICK]


@dataclass
class Renamed:
    """A checkpoint, and what its conversion would be, by the policy."""

    name: str
    path: Path
    drafts: dict[str, Draft] = field(default_factory=dict)

    def draft(self, policy: str) -> Draft:
        if policy not in self.drafts:
            self.drafts[policy] = drafted(self.path, POLICIES[policy])
        return self.drafts[policy]


def drafted(path: Path, policy: QuantizationPolicy) -> Draft:
    storage = FinalStorage(CPU)
    return draft_load(
        resolve(path), "auto", policy, LoadOptions(), storage, lambda *_: None, False, plan_without_pieces
    )


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def renamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Renamed:
    name: str = request.param
    return Renamed(name, renamed_architectures.save(name, tmp_path_factory.mktemp("renamed") / name))


def written(draft: Draft, form: str) -> tuple[NamedModules, dict[str, Any]]:
    """The names in a checkpoint of this format, and its `quantization_config`."""
    export = EXPORT_FORMATS[form]
    tensors = plan_tensors(draft.sources.entries, draft.routes, draft.loaders, draft.assignments, export)
    named = name_modules(draft.model, tensors, draft.routes)
    return named, export.quantization_config(named)


def wanted(draft: Draft, form: str) -> dict[str, Any]:
    """What is said of the format of every linear layer, by its name in the model."""
    weights = EXPORT_FORMATS[form].weights
    return {
        each.name: None if each.scheme is None else weights[each.scheme.kernels.format.name].config
        for each in draft.assignments
        if each.kind == "linear"
    }


def in_the_files(draft: Draft) -> dict[str, str]:
    """The name of every linear layer in the checkpoint, by that in the model; a tied head has none of its own."""
    names = {
        span.parameter.removesuffix(".weight"): tensor.removesuffix(".weight")
        for tensor, spans in draft.routes.spans.items()
        for span in spans
    }
    return {each.name: names.get(each.name, each.name) for each in draft.assignments if each.kind == "linear"}


def same(got: Any, want: Any) -> bool:
    """Whether a tool's choice is the description that is wanted; groups have their targets besides."""
    if got is None or want is None:
        return got is want
    return {key: got[key] for key in want if key != "targets"} == {k: v for k, v in want.items() if k != "targets"}


@pytest.mark.parametrize("policy", FP8)
@pytest.mark.parametrize(
    ("form", "rule"), [("compressed-tensors", reader_rules.compressed_tensors), ("quark", reader_rules.quark)]
)
def test_tools_find_every_layer_by_its_name_in_the_model_and_by_that_in_the_files(
    form: str, rule: Callable[[Any, str], Any], policy: str, renamed: Renamed
) -> None:
    draft = renamed.draft(policy)
    files, (_, config) = in_the_files(draft), written(draft, form)
    assert [name for name, stored in files.items() if name != stored] or renamed.name == "mixtral"
    assert any(each.scheme is not None for each in draft.assignments)
    for name, layer in wanted(draft, form).items():
        assert same(rule(config, name), layer), name
        assert same(rule(config, files[name]), layer), files[name]


@pytest.mark.parametrize("policy", FP8)
@pytest.mark.parametrize(
    ("form", "rule"),
    [("compressed-tensors", reader_rules.vllm_compressed_tensors), ("quark", reader_rules.vllm_quark)],
)
def test_vllm_finds_every_layer_by_its_own_name(
    form: str, rule: Callable[[Any, str, Any], Any], policy: str, renamed: Renamed
) -> None:
    if renamed.name not in reader_rules.VLLM_PREFIXES:
        pytest.skip("vLLM does not serve it")
    prefixes = reader_rules.VLLM_PREFIXES[renamed.name]
    draft = renamed.draft(policy)
    files, (_, config) = in_the_files(draft), written(draft, form)
    for name, layer in wanted(draft, form).items():
        if not name.endswith("lm_head"):  # which is no linear layer there
            own = reader_rules.vllm_name(f"{files[name]}.", prefixes).removesuffix(".")
            assert same(rule(config, own, prefixes), layer), own


def test_modelopt_s_list_of_what_is_kept_has_both_names(renamed: Renamed) -> None:
    draft = renamed.draft("NVFP4, towers kept")
    files, (_, config) = in_the_files(draft), written(draft, "modelopt")
    for name, layer in wanted(draft, "modelopt").items():
        for called in (name, files[name]):
            assert same(reader_rules.modelopt(config, called), layer), called


def test_heads_are_named_beside_the_class_of_linear_layers(tmp_path: Path) -> None:
    policy = QuantizationPolicy(linear="quark_mxfp4", overrides=(("lm_head", "quark_mxfp4"),))
    draft = drafted(renamed_architectures.save("llava", tmp_path / "llava"), policy)
    _, config = written(draft, "compressed-tensors")
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "language_model.lm_head", "lm_head"]
    assert config["ignore"] == []


def test_kept_experts_in_one_tensor_are_named_for_tools_that_take_them_one_by_one(
    checkpoint: Callable[[str], Path],
) -> None:
    policy = QuantizationPolicy(linear="fp8_per_channel", experts="none")
    draft = drafted(checkpoint("qwen3_vl_moe"), policy)
    _, config = written(draft, "compressed-tensors")
    experts = "model.language_model.layers.1.mlp.experts"
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert reader_rules.compressed_tensors(config, f"{experts}.3.{name}") is None
        own = f"language_model.model.layers.1.mlp.experts.0.{name}"
        assert reader_rules.vllm_compressed_tensors(config, own, reader_rules.VLLM_PREFIXES["llava"]) is None
    assert reader_rules.vllm_quark(written(draft, "quark")[1], experts, {}) is None


def planned(of: Mapping[str, tuple[str, str | None]]) -> tuple[list[Any], Routes]:
    """Matrices of a checkpoint: where in the model each goes, and the format it gets, if any."""
    routes = Routes({name: [Span(to, Region(None, (0, 2), (0, 2)), 0, 2, 1)] for name, (to, _) in of.items()})
    tensors: list[Any] = []
    for name, (_, fmt) in of.items():
        entry = TensorEntry(name, torch.bfloat16, (2, 2), 0, 0, 8)
        if fmt is None:
            tensors.append(KeptTensor(entry))
        else:
            layout = WeightLayout(FORMATS[fmt], None, (("", 2),), 2)
            stem = name.removesuffix("weight")
            unused: Any = None
            assignment = Assignment("", "linear", nn.Module(), None, "")
            tensors.append(QuantizedTensor(entry, stem, assignment, unused, layout, unused, ()))
    return tensors, routes


def test_a_name_that_is_one_module_in_the_files_and_another_in_the_model_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    swapped = {"b.weight": ("a.weight", "int8_channel"), "a.weight": ("b.weight", None)}
    with pytest.raises(PolicyError, match=r"^b is the name of one module .* kept, the other int8_channel; "):
        name_modules(model, *planned(swapped))
    alike = {name: (to, "int8_channel") for name, (to, _) in swapped.items()}
    assert name_modules(model, *planned(alike)).formats.keys() == {"a", "b"}


def test_experts_are_one_name_only_where_all_of_them_are_alike() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"w": nn.Linear(2, 2)}) for _ in range(3)])})
    model = nn.ModuleDict({"layer": model})
    names = [f"layer.experts.{number}.w" for number in range(3)]
    alike = {f"{name}.weight": (f"{name}.weight", "int8_channel") for name in names}
    assert [*name_modules(model, *planned(alike)).formats] == ["layer.experts.*.w"]
    one_kept = {**alike, f"{names[1]}.weight": (f"{names[1]}.weight", None)}
    named = name_modules(model, *planned(one_kept))
    assert ([*named.formats], named.kept) == ([names[0], names[2]], [names[1]])
