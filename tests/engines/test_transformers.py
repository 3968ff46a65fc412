"""transformers' `from_pretrained` with a `QuantloadConfig`: the model of `load_quantized`, to the byte."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import architectures
import pytest
import renamed_architectures
import torch
import transformers
from architectures import Architecture
from quantload import LoadOptions, QuantizationPolicy, QuantloadConfig, load_quantized
from quantload.cli import DEMO_MODEL
from quantload.engines import transformers as door
from quantload.errors import CheckpointError, PolicyError, QuantloadError, UnsupportedCheckpointError
from quantload.memory.report import LoadReport
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

SCHEMES = [entry.name for entry in ENTRIES]
IDS = torch.tensor([[5, 9, 23, 54, 8, 40]])


def through_the_door(folder: Path, scheme: str = "quark_mxfp4", **given: Any) -> Any:
    config = QuantloadConfig(scheme, progress=False, **given.get("config", {}))
    others = {name: value for name, value in given.items() if name != "config"}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **others)


def assert_same(got: torch.nn.Module, want: torch.nn.Module) -> None:
    """Every tensor, its dtype and the dtypes that code sees."""
    ours, theirs = got.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert [(n, p.dtype) for n, p in got.named_parameters()] == [(n, p.dtype) for n, p in want.named_parameters()]
    buffers = dict(want.named_buffers())
    for name, buffer in got.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.fixture(scope="module")
def demo() -> Any:
    return through_the_door(DEMO_MODEL)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_bytes_of_load_quantized(scheme: str) -> None:
    ours, want = through_the_door(DEMO_MODEL, scheme), load_quantized(DEMO_MODEL, scheme, progress=False)
    assert_same(ours, want)
    assert torch.equal(ours(IDS).logits, want(IDS).logits)
    assert ours.generation_config.to_dict() == want.generation_config.to_dict()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_saved_and_comes_back_or_says_why_not(scheme: str, tmp_path: Path) -> None:
    ours = through_the_door(DEMO_MODEL, scheme)
    if scheme in ("fp8_per_tensor", "nvfp4"):
        with pytest.raises(UnsupportedCheckpointError, match="cannot read back"):
            ours.save_pretrained(tmp_path)
        return
    ours.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), ours)


def test_the_report_and_the_plan_are_those_of_load_quantized(demo: Any) -> None:
    want = load_quantized(DEMO_MODEL, "quark_mxfp4", progress=False)
    assert demo.load_plan == want.load_plan
    timed = {"seconds", "timeline", "baseline_bytes", "peak_bytes", "staging_peak_bytes", "model"}
    timed |= {"available_bytes", "phases"}
    report: LoadReport = demo.load_report
    ours, theirs = report.to_dict(), want.load_report.to_dict()
    assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    assert not demo.training
    assert not {"mark_tied_weights_as_initialized", "_move_missing_keys_from_meta_to_device"} & vars(demo).keys()


def test_policy_and_options_count() -> None:
    options = LoadOptions(stats=False)
    policy = QuantizationPolicy(ignore=("*.self_attn.*",), overrides=(("*.o_proj", "int8_per_channel"),))
    want = load_quantized(DEMO_MODEL, "fp8_per_channel", policy=policy, options=options, progress=False)
    fields = {"ignore": policy.ignore, "overrides": policy.overrides, "options": {"stats": False}}
    for given in (fields, {"policy": policy, "options": options}):
        ours = through_the_door(DEMO_MODEL, "fp8_per_channel", config=given)
        assert_same(ours, want)
        assert ours.load_report.layers[0].sqnr_db is None


def test_a_dtype_is_that_of_what_stays() -> None:
    ours = through_the_door(DEMO_MODEL, dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert ours.get_input_embeddings().weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    half = through_the_door(DEMO_MODEL, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half(IDS).logits.dtype == torch.float16


def test_loading_info_says_what_transformers_would_say(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "more")
    shard = tmp_path / "more" / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "unknown.weight": torch.ones(3)}, shard, metadata={"format": "pt"})
    index = tmp_path / "more" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["unknown.weight"] = shard.name
    index.write_text(json.dumps(found))
    _, ours = through_the_door(tmp_path / "more", output_loading_info=True)
    _, theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "more", output_loading_info=True)
    assert ours == theirs
    assert ours["unexpected_keys"] == {"unknown.weight"}


ROUND_TRIPS = [
    *architectures.named("llama", "gpt2", "t5", "qwen3_moe", "gpt_oss"),
    *(renamed_architectures.BY_NAME[name] for name in ("llava", "mixtral")),
]


def saved_architecture(architecture: Architecture, folder: Path) -> Path:
    if architecture.name in renamed_architectures.BY_NAME:
        return renamed_architectures.save(architecture.name, folder)
    return architectures.save(architecture, folder)


@pytest.mark.parametrize("architecture", ROUND_TRIPS, ids=lambda each: each.name)
def test_what_is_saved_comes_back(architecture: Architecture, tmp_path: Path) -> None:
    """From `from_pretrained`, however transformers saved it, and from `load_quantized`; to the byte."""
    original = saved_architecture(architecture, tmp_path / "original")
    cls = architecture.model_class
    config = QuantloadConfig("fp8_per_channel", progress=False)
    ours = cls.from_pretrained(original, quantization_config=config)
    assert_same(ours, load_quantized(original, "fp8_per_channel", progress=False))
    want = architectures.logits(ours, architecture.inputs())
    for number, way in enumerate(({}, {"save_original_format": False, "max_shard_size": "100KB"})):
        ours.save_pretrained(tmp_path / str(number), **way)
        again = cls.from_pretrained(tmp_path / str(number))
        assert_same(again, ours)
        assert torch.equal(architectures.logits(again, architecture.inputs()), want)
        assert_same(load_quantized(tmp_path / str(number), progress=False), ours)
        assert again.load_report.layers[0].format == "fp8_channel"
    again.save_pretrained(tmp_path / "twice")
    assert_same(cls.from_pretrained(tmp_path / "twice"), ours)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor", "int4_per_group"])
@pytest.mark.parametrize("architecture", [*architectures.ALL, *renamed_architectures.ALL], ids=lambda each: each.name)
def test_every_architecture_in_every_scheme(architecture: Architecture, scheme: str, tmp_path: Path) -> None:
    original = saved_architecture(architecture, tmp_path / "original")
    cls: Any = architecture.model_class
    try:
        want = load_quantized(original, scheme, progress=False)
    except QuantloadError as error:
        with pytest.raises(type(error)):
            cls.from_pretrained(original, quantization_config=QuantloadConfig(scheme, progress=False))
        return
    ours = cls.from_pretrained(original, quantization_config=QuantloadConfig(scheme, progress=False))
    assert_same(ours, want)
    if scheme == "fp8_per_tensor" and any("experts" in layer.kind for layer in ours.load_report.layers):
        with pytest.raises(UnsupportedCheckpointError, match="cannot read back"):
            ours.save_pretrained(tmp_path / "saved")
        return
    ours.save_pretrained(tmp_path / "saved")
    assert_same(cls.from_pretrained(tmp_path / "saved"), ours)


def test_a_pipeline_takes_it() -> None:
    config = QuantloadConfig("int8_per_channel", progress=False)
    generate = pipeline("text-generation", model=str(DEMO_MODEL), model_kwargs={"quantization_config": config})
    said = generate("The", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.startswith("The")
    assert len(said) > len("The")
    assert generate.model.load_report.layers


def test_a_damaged_entry_of_the_cache_is_read_around(tmp_path: Path) -> None:
    """The load begins anew, with the model that transformers holds."""
    given: dict[str, Any] = {"config": {"options": LoadOptions(cache=tmp_path)}}
    first = through_the_door(DEMO_MODEL, **given)
    entry = next(tmp_path.glob("*/*.safetensors"))
    damaged = bytearray(entry.read_bytes())
    damaged[-9] ^= 4
    entry.write_bytes(damaged)
    second = through_the_door(DEMO_MODEL, **given)
    assert second.load_report.cache == "rebuilt"
    assert_same(second, first)
    third = through_the_door(DEMO_MODEL, **given)
    assert third.load_report.cache == "hit"
    assert_same(third, first)


def test_a_copied_model_is_saved_alike(demo: Any, tmp_path: Path) -> None:
    copied = copy.deepcopy(demo)
    copied.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), demo)


def test_what_no_config_can_say_is_not_saved(tmp_path: Path) -> None:
    model = through_the_door(DEMO_MODEL, config={"options": {"activations": "emulate"}})
    with pytest.raises(UnsupportedCheckpointError, match="rounds its activations"):
        model.save_pretrained(tmp_path)


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL / "config.json", tmp_path)
    weights = {k: v for each in DEMO_MODEL.glob("*.safetensors") for k, v in load_file(each).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpointError, match=r"pytorch_model\.bin; quantload streams from safetensors"):
        through_the_door(tmp_path)
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL)
    with pytest.raises(UnsupportedCheckpointError, match="a state dict"):
        transformers.Qwen3MoeForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, quantization_config=QuantloadConfig("int8_per_channel")
        )


def test_files_that_the_index_does_not_name_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="other")
    with pytest.raises(UnsupportedCheckpointError, match=r"the index of .* names others"):
        through_the_door(tmp_path, variant="other")


@pytest.mark.parametrize(
    ("device_map", "place"),
    [(None, "cpu"), ("auto", "cpu"), ({"": "cpu"}, "cpu"), ({"model": "cpu", "lm_head": "cpu"}, "cpu")],
)
def test_one_device_is_taken(device_map: Any, place: str) -> None:
    if torch.cuda.is_available() and device_map == "auto":
        place = "cuda"
    assert door._one_device(device_map).type == place


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": "cuda:0", "lm_head": "cpu"}])
def test_several_devices_are_refused(device_map: dict[str, str]) -> None:
    with pytest.raises(PolicyError, match="puts a model on one device"):
        door._one_device(device_map)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scheme": "quark_mxfp5"}, {"ignored": ["x"]}, {"options": {"stat": False}}, {"ignore": "x"},
        {"policy": QuantizationPolicy(), "ignore": ("x",)},
    ],
)  # fmt: skip
def test_a_config_that_no_load_would_take_is_an_error_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        QuantloadConfig(**wrong)


def test_a_wrong_checkpoint_is_our_error_and_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "cut")
    shard = tmp_path / "cut" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        through_the_door(tmp_path / "cut")
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"
    assert isinstance(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), PreTrainedModel)


def test_a_config_is_short_to_read_and_survives_json() -> None:
    config = QuantloadConfig("MXFP4", ignore=["*.o_proj"], experts="int8_per_channel")
    assert repr(config) == "QuantloadConfig('mxfp4', experts='int8_per_channel', ignore=('*.o_proj',))"
    again = QuantloadConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.policy == config.policy
    assert again.scheme == config.scheme


def test_registering_twice_is_no_error() -> None:
    door.register()
    door.register()


def test_tied_weights_that_differ_are_reported(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "untied")
    shard = tmp_path / "untied" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = torch.randn(512, 256).to(torch.bfloat16)
    config = json.loads((tmp_path / "untied" / "config.json").read_text())
    tensors["lm_head.weight"] = torch.randn(config["vocab_size"], config["hidden_size"]).to(torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = tmp_path / "untied" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["lm_head.weight"] = shard.name
    index.write_text(json.dumps(found))
    want = load_quantized(tmp_path / "untied", "quark_mxfp4", progress=False)
    ours = through_the_door(tmp_path / "untied")
    assert ours.load_report.untied == want.load_report.untied == ["lm_head.weight"]
    assert_same(ours, want)
