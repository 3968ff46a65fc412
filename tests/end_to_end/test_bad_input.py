"""Whatever is wrong gets an error that says what and where, and nothing is left behind."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import process_state
import pytest
import raw_checkpoint
import torch
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, load_quantized
from quantload import errors as e
from quantload.checkpoint.reader import PieceReader
from quantload.model import transformers_api
from quantload.planning import plan_quantized
from torch import Tensor

Checkpoint = Callable[[str], Path]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _warmed_up(checkpoint: Checkpoint) -> None:
    """What a first load opens for good is not a leak of the load that fails."""
    load_quantized(checkpoint("llama"), "quark_mxfp4")


@pytest.fixture(autouse=True)
def _nothing_is_left(_warmed_up: None) -> Iterator[None]:
    threads, descriptors = process_state.threads(), process_state.descriptors()
    yield
    assert process_state.threads() <= threads
    assert len(process_state.descriptors()) <= len(descriptors), process_state.descriptors()


@pytest.fixture
def llama(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint of one file that the test may spoil."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


@pytest.fixture
def sharded(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint of three files and an index that the test may spoil."""
    return raw_checkpoint.shuffled(tmp_path / "sharded", checkpoint("llama"), 0, 3)


def rewritten(tmp_path: Path, like: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the checkpoint `like` after `change` on its tensors."""
    tensors = raw_checkpoint.read(like)
    change(tensors)
    return raw_checkpoint.write(tmp_path / "rewritten", like, [tensors])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 1000, 10**9])
def test_truncated_shard(missing: int, llama: Path) -> None:
    shard = llama / raw_checkpoint.SINGLE
    content = shard.read_bytes()
    shard.write_bytes(content[: max(0, len(content) - missing)])
    with pytest.raises(e.CheckpointError, match=re.escape(raw_checkpoint.SINGLE)) as caught:
        load_quantized(llama)
    if missing < len(content):
        assert isinstance(caught.value, e.TruncatedShardError)


def test_bytes_after_the_last_tensor(llama: Path) -> None:
    with (llama / raw_checkpoint.SINGLE).open("ab") as shard:
        shard.write(b"more")
    with pytest.raises(e.CheckpointError, match=re.escape(raw_checkpoint.SINGLE)):
        load_quantized(llama)


def _overlap(header: dict[str, Any]) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def _negative(header: dict[str, Any]) -> None:
    start, end = header[Q_PROJ]["data_offsets"]
    header[Q_PROJ]["data_offsets"] = [start - end, 0]


def _wrong_length(header: dict[str, Any]) -> None:
    header[Q_PROJ]["shape"] = [64, 65]


def _huge_shape(header: dict[str, Any]) -> None:
    header[Q_PROJ]["shape"] = [2**62, 2**62]


def _unknown_dtype(header: dict[str, Any]) -> None:
    header[Q_PROJ]["dtype"] = "BF17"


def _no_shape(header: dict[str, Any]) -> None:
    del header[Q_PROJ]["shape"]


@pytest.mark.parametrize("spoil", [_overlap, _negative, _wrong_length, _huge_shape, _unknown_dtype, _no_shape])
def test_hostile_header_entry(spoil: Callable[[dict[str, Any]], None], llama: Path) -> None:
    shard = llama / raw_checkpoint.SINGLE
    header, data = raw_checkpoint.split_header(shard)
    spoil(header)
    raw_checkpoint.join_header(shard, header, data)
    with pytest.raises(e.CheckpointError, match=re.escape(raw_checkpoint.SINGLE)):
        load_quantized(llama)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02\x03",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1, ',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 4) + b'\xff\xfe"}',
    ],
    ids=["empty", "short", "huge length", "zero length", "a list", "broken", "deep", "not UTF-8"],
)
def test_hostile_header(content: bytes, llama: Path) -> None:
    (llama / raw_checkpoint.SINGLE).write_bytes(content)
    with pytest.raises(e.CheckpointError, match=re.escape(raw_checkpoint.SINGLE)):
        load_quantized(llama)


def test_duplicate_name_in_a_header(llama: Path) -> None:
    shard = llama / raw_checkpoint.SINGLE
    header, data = raw_checkpoint.split_header(shard)
    entry = json.dumps(header[Q_PROJ])
    raw_checkpoint.join_header(shard, f'{json.dumps(header)[:-1]}, "{Q_PROJ}": {entry}}}'.encode(), data)
    with pytest.raises(e.CorruptHeaderError, match=re.escape(Q_PROJ)):
        load_quantized(llama)


def test_header_of_hundreds_of_megabytes_is_refused_unread(llama: Path) -> None:
    shard = llama / raw_checkpoint.SINGLE
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", 400 << 20))
        file.truncate(8 + (400 << 20))
    before = process_state.status_bytes("VmHWM")
    with pytest.raises(e.CheckpointError, match=re.escape(raw_checkpoint.SINGLE)):
        load_quantized(llama)
    assert process_state.status_bytes("VmHWM") < before + (150 << 20)


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "..", "sub/../../other.safetensors"])
def test_index_that_leaves_the_folder(target: str, sharded: Path) -> None:
    edit_json(sharded / raw_checkpoint.INDEX, lambda index: index["weight_map"].update({Q_PROJ: target}))
    with pytest.raises(e.UnsafePathError, match=re.escape(target)):
        load_quantized(sharded)


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(e.MissingShardError, match=re.escape(gone.name)):
        load_quantized(sharded)


def test_index_names_a_tensor_its_shard_lacks(sharded: Path) -> None:
    index = sharded / raw_checkpoint.INDEX
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    edit_json(index, lambda content: content["weight_map"].update({"model.layers.7.mystery": shard}))
    with pytest.raises(e.QuantloadError, match=r"model\.layers\.7\.mystery"):
        load_quantized(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_broken_index(content: str, sharded: Path) -> None:
    (sharded / raw_checkpoint.INDEX).write_text(content)
    with pytest.raises(e.CheckpointError, match=re.escape(raw_checkpoint.INDEX)):
        load_quantized(sharded)


def test_pickle_checkpoint(llama: Path) -> None:
    (llama / raw_checkpoint.SINGLE).unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(e.UnsupportedCheckpointError, match="safetensors"):
        load_quantized(llama)


def test_folder_without_weights(llama: Path) -> None:
    (llama / raw_checkpoint.SINGLE).unlink()
    with pytest.raises(e.QuantloadError, match="safetensors"):
        load_quantized(llama)


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(e.QuantloadError, match="nowhere"):
        load_quantized(tmp_path / "nowhere")


def test_a_flipped_bit_of_a_plain_weight_is_the_weight_that_is_loaded(llama: Path) -> None:
    """A shard has no checksums: what lies there counts, here and in transformers (docs/reliability.md)."""
    shard, name = llama / raw_checkpoint.SINGLE, "model.norm.weight"
    header, data = raw_checkpoint.split_header(shard)
    spoilt = bytearray(data)
    spoilt[header[name]["data_offsets"][0]] ^= 1 << 5
    raw_checkpoint.join_header(shard, header, bytes(spoilt))
    expected = raw_checkpoint.read(llama)[name]
    assert torch.equal(load_quantized(llama, "none").state_dict()[name], expected)


# -- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "", '{"model_type": "llama", "hidden_size": '])
def test_broken_config(content: str, llama: Path) -> None:
    (llama / "config.json").write_text(content)
    with pytest.raises(e.CheckpointError, match=r"config\.json"):
        load_quantized(llama)


def test_missing_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(e.CheckpointError, match=r"config\.json"):
        load_quantized(llama)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (None, "architectures"),
        ([], "architectures"),
        ("LlamaForCausalLM", "architectures"),
        ([3], "architectures"),
        (["NoSuchModelForCausalLM"], "NoSuchModelForCausalLM"),
        (["LlamaConfig"], "LlamaConfig"),
    ],
)
def test_architectures(architectures: object, message: str, llama: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["architectures"] = architectures
        if architectures is None:
            del config["architectures"]

    edit_json(llama / "config.json", change)
    with pytest.raises(e.QuantloadError, match=message):
        load_quantized(llama)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "no_such_model"}, "ValueError: .*no_such_model.*update transformers"),
        ({"hidden_size": "wide"}, "hidden_size.*TypeError: .*wide.*compare the file with the original"),
        ({"rope_parameters": {"rope_type": "no_such_rope"}}, "no_such_rope.*compare the file with the original"),
        ({"hidden_act": "no_such_act"}, "build a LlamaForCausalLM of it: KeyError: .*no_such_act.*compare the file"),
        ({"head_dim": -1}, "build a LlamaForCausalLM of it: RuntimeError: .*negative.*compare the file"),
    ],
)
def test_config_values_that_make_no_model(change: dict[str, object], said: str, llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(change))
    with pytest.raises(
        e.CheckpointError, match=f"^{re.escape(str(llama / 'config.json'))}: transformers .*{said}"
    ) as caught:
        load_quantized(llama)
    assert "\n" not in str(caught.value)


BROKEN_GENERATION_CONFIGS = {
    "not finished": "{", "a list": "[]", "text": '"text"', "null": "null", "a number": "3", "deep": "[" * 100_000,
    "no value": '{"eos_token_id": ', "bytes": "\udcff",
    "max_new_tokens as text": '{"max_new_tokens": "many"}', "max_new_tokens below 0": '{"max_new_tokens": -4}',
    "max_new_tokens 0": '{"max_new_tokens": 0}', "cache_implementation": '{"cache_implementation": "nope"}',
    "cache_implementation as number": '{"cache_implementation": 3}', "compile_config": '{"compile_config": "x"}',
    "watermarking_config": '{"watermarking_config": "x"}', "pad_token_id": '{"pad_token_id": "x"}',
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN_GENERATION_CONFIGS.values(), ids=BROKEN_GENERATION_CONFIGS.keys())
def test_a_broken_generation_config_is_named_before_a_weight_is_read(
    content: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama / "generation_config.json"
    path.write_text(content, errors="surrogateescape")
    monkeypatch.setattr(PieceReader, "run", None)
    said = rf"^{re.escape(str(path))}: transformers .* or remove it, for what config"
    for call in (load_quantized, plan_quantized, lambda folder: convert_checkpoint(folder, tmp_path / "out")):
        with pytest.raises(e.CheckpointError, match=said):
            call(llama)
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "value", ["float8_e4m3fn", "float8_e8m0fnu", "int8", "bool", "auto", "Tensor", "", "\ud800", 3, True, ["float16"],
              {"": "int8"}, {"": "float16", "text_config": 3}]
)  # fmt: skip
def test_a_dtype_that_no_model_is_built_in(
    value: Any, field: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(config: dict[str, Any]) -> None:
        config.pop("dtype")
        config[field] = value

    edit_json(llama / "config.json", change)
    monkeypatch.setattr(PieceReader, "run", None)
    message = f"{llama / 'config.json'}: `{field}` is {value!r}; models are built in one of float32, bfloat16, float16,"
    for attempt in (load_quantized, plan_quantized):
        with pytest.raises(e.CheckpointError, match=f"^{re.escape(message)}"):
            attempt(llama, "none")


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "double"}, torch.float64),
        ({"dtype": {"": "float16"}}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "int8"}, torch.float16),
        ({"dtype": None}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_a_dtype_that_a_model_is_built_in(fields: dict[str, Any], dtype: torch.dtype, llama: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.pop("dtype")
        config.update(fields)

    edit_json(llama / "config.json", change)
    assert plan_quantized(llama, "none").model.dtype is dtype


def test_a_model_that_computes_in_float64_is_left_as_stored_and_runs(llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(dtype="float64"))
    model = load_quantized(llama, "quark_mxfp4", progress=False)
    assert {kept.reason for kept in model.load_report.kept} >= {"the model computes in float64, and no kernel does"}
    assert not model.load_report.layers
    assert model(torch.tensor([[5, 9]])).logits.dtype == torch.float64


def test_a_number_of_layers_that_is_none(llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(num_hidden_layers=-1))
    with pytest.raises(e.UnexpectedWeightsError, match=r"is config\.json the one of this checkpoint"):
        load_quantized(llama, options=LoadOptions(strict=True))


def test_unknown_quant_method(llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(quantization_config={"quant_method": "magic"}))
    with pytest.raises(e.UnsupportedCheckpointError, match="magic"):
        load_quantized(llama)


# -- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["quark_mxfp4", "none", "fp8_per_tensor"])
@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("llama", Q_PROJ),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama_odd", "model.layers.0.self_attn.k_proj.bias"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"),
    ],
)
def test_missing_tensor(name: str, gone: str, quantization: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = rewritten(tmp_path, checkpoint(name), lambda tensors: tensors.pop(gone))
    with pytest.raises(e.MissingWeightsError, match=re.escape(gone)):
        load_quantized(path, quantization)


@pytest.mark.parametrize("quantization", ["quark_mxfp4", "none", "fp8_per_tensor", "int8_per_channel"])
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_missing_expert(part: str, quantization: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    gone = f"model.layers.1.mlp.experts.2.{part}.weight"
    path = rewritten(tmp_path, checkpoint("qwen3_moe"), lambda tensors: tensors.pop(gone))
    with pytest.raises(e.MissingWeightsError) as caught:
        load_quantized(path, quantization)
    message = str(caught.value)
    assert "model.layers.1.mlp.experts" in message
    assert re.search(rf"experts\.2\.{part}|expert 2\b", message), message


def test_missing_last_expert_is_not_a_smaller_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts.3." in name]:
            del tensors[name]

    with pytest.raises(e.MissingWeightsError, match="experts"):
        load_quantized(rewritten(tmp_path, checkpoint("qwen3_moe"), drop))


def test_an_expert_more_than_the_config_has(checkpoint: Checkpoint, tmp_path: Path) -> None:
    extra = "model.layers.1.mlp.experts.9.up_proj.weight"
    path = rewritten(tmp_path, checkpoint("qwen3_moe"), lambda tensors: tensors.update({extra: torch.zeros(32, 64)}))
    with pytest.raises(e.RouteError, match=re.escape(extra)) as caught:
        load_quantized(path)
    assert isinstance(caught.value, e.UnexpectedWeightsError | e.ShapeMismatchError)


@pytest.mark.parametrize("quantization", ["quark_mxfp4", "none"])
@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("llama", Q_PROJ, (64, 32)),
        ("llama", Q_PROJ, (32, 64)),
        ("llama", Q_PROJ, (4096,)),
        ("llama", "model.norm.weight", (63,)),
        ("llama", "model.embed_tokens.weight", (159, 64)),
        ("qwen3_moe", EXPERT, (32, 32)),
        ("qwen3_moe", EXPERT, (33, 64)),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 64, 32)),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", (256, 64)),
    ],
)
def test_wrong_shape(
    name: str, tensor: str, shape: tuple[int, ...], quantization: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    values = torch.zeros(shape, dtype=torch.bfloat16)
    path = rewritten(tmp_path, checkpoint(name), lambda tensors: tensors.update({tensor: values}))
    with pytest.raises(e.ShapeMismatchError, match=re.escape(tensor)) as caught:
        load_quantized(path, quantization)
    assert all(str(size) in str(caught.value) for size in shape)


@pytest.mark.parametrize("quantization", ["none", "quark_mxfp4"])
@pytest.mark.parametrize(
    ("name", "tensor", "dtype"),
    [
        ("llama", Q_PROJ, torch.float8_e4m3fn),
        ("llama", Q_PROJ, torch.float8_e5m2),
        ("llama", Q_PROJ, torch.int8),
        ("llama", "model.norm.weight", torch.float8_e4m3fn),
        ("qwen3_moe", EXPERT, torch.float8_e4m3fn),
    ],
)
def test_codes_without_a_config_that_says_what_they_stand_for(
    name: str, tensor: str, dtype: torch.dtype, quantization: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = rewritten(tmp_path, checkpoint(name), lambda tensors: tensors.update({tensor: tensors[tensor].to(dtype)}))
    with pytest.raises(e.CheckpointError, match=f"{re.escape(tensor)} is {dtype}.*quantization_config") as caught:
        load_quantized(path, quantization)
    assert type(caught.value) is e.CheckpointError


@pytest.mark.parametrize("quantization", ["auto", "none", "quark_mxfp4"])
@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "weight_scale_2", "scale", "qscale_weight"])
@pytest.mark.parametrize(("name", "tensor"), [("llama", Q_PROJ), ("qwen3_moe", EXPERT)])
def test_codes_and_their_scales_without_a_config_that_says_what_they_stand_for(
    name: str, tensor: str, scale: str, quantization: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Tensors of a quantized checkpoint beside a config that lost its `quantization_config`."""

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor] = tensors[tensor].to(torch.float8_e4m3fn)
        tensors[f"{tensor.removesuffix('weight')}{scale}"] = torch.ones(1, 1)

    path = rewritten(tmp_path, checkpoint(name), quantize)
    message = f"{re.escape(tensor)} is torch.float8_e4m3fn, .*, and no quantization_config in config.json says"
    with pytest.raises(e.CheckpointError, match=message):
        load_quantized(path, quantization)


def test_scales_of_what_is_not_codes_are_unexpected(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = rewritten(
        tmp_path, checkpoint("llama"), lambda tensors: tensors.update({f"{Q_PROJ}_scale": torch.ones(1, 1)})
    )
    with pytest.raises(e.UnexpectedWeightsError, match=rf"1 checkpoint tensors .*{re.escape(Q_PROJ)}_scale"):
        load_quantized(path, options=LoadOptions(strict=True))


def test_a_parameter_that_the_model_itself_holds_in_float8(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that stand for nothing but themselves: the model's code knows what to do with them."""
    usual = transformers_api.DtypePlan.__call__

    def plan(self: Any, name: str, created: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn if name == Q_PROJ else usual(self, name, created)

    monkeypatch.setattr(transformers_api.DtypePlan, "__call__", plan)
    want = raw_checkpoint.read(checkpoint("llama"))[Q_PROJ].to(torch.float8_e4m3fn)
    path = rewritten(tmp_path, checkpoint("llama"), lambda tensors: tensors.update({Q_PROJ: want}))
    got = load_quantized(path, "none").state_dict()[Q_PROJ]
    assert got.dtype == torch.float8_e4m3fn
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


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


PLACES = [
    ("llama", Q_PROJ, (63, 61)),
    ("llama_odd", "model.layers.0.mlp.down_proj.weight", (77, 111)),
    ("qwen3_moe", EXPERT, (21, 9)),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (3, 59, 33)),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight", (41, 203)),
]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize(
    ("scheme", "value", "name", "tensor", "index"),
    [
        pytest.param(scheme, NOT_FINITE[(i + j) % 3], *place, id=f"{scheme}-{NOT_FINITE[(i + j) % 3]}-{place[0]}")
        for i, scheme in enumerate(SCHEMES)
        for j, place in enumerate(PLACES)
    ],
)
def test_nonfinite_weight(
    name: str,
    tensor: str,
    index: tuple[int, ...],
    value: float,
    scheme: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    """Each scheme and each place meets every value; `test_kernel_pieces.py` has all of them in every format."""
    path = rewritten(tmp_path, checkpoint(name), lambda tensors: tensors[tensor].__setitem__(index, value))
    with pytest.raises(e.NonFiniteWeightError, match=re.escape(tensor)) as caught:
        load_quantized(path, scheme, options=LoadOptions(chunk_bytes=4096))
    assert ", ".join(map(str, index)) in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("llama_float16", float("inf")), ("llama_float32", float("nan"))])
def test_nonfinite_weight_in_other_dtypes(name: str, value: float, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = rewritten(tmp_path, checkpoint(name), lambda tensors: tensors[Q_PROJ].__setitem__((5, 6), value))
    with pytest.raises(e.NonFiniteWeightError, match=re.escape(Q_PROJ)) as caught:
        load_quantized(path)
    assert "5, 6" in str(caught.value)
    advised = re.search("--ignore '(.*)'", str(caught.value))
    assert advised is not None
    kept = load_quantized(path, policy=QuantizationPolicy(ignore=(advised[1],))).load_report.kept
    assert {module.name for module in kept} > {Q_PROJ.removesuffix(".weight")}


def test_what_a_conversion_advises_of_a_nonfinite_expert_can_be_done(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensor = "model.layers.1.mlp.experts.2.up_proj.weight"
    path = rewritten(tmp_path, checkpoint("qwen3_moe"), lambda tensors: tensors[tensor].__setitem__((1, 2), math.nan))
    with pytest.raises(e.NonFiniteWeightError, match=re.escape(tensor)) as caught:
        convert_checkpoint(path, tmp_path / "out", "quark_mxfp4")
    advised = re.search("--ignore '(.*)'", str(caught.value))
    assert advised is not None
    assert advised[1] == "model.layers.1.mlp.experts"
    convert_checkpoint(path, tmp_path / "out", policy=QuantizationPolicy("quark_mxfp4", ignore=(advised[1],)))
    assert (tmp_path / "out").is_dir()


# -- what the caller asks for ---------------------------------------------------------------------------------------


def test_unknown_scheme(checkpoint: Checkpoint) -> None:
    with pytest.raises(e.UnknownSchemeError, match="mxfp5") as caught:
        load_quantized(checkpoint("qwen3_moe"), "mxfp5")
    assert all(name in str(caught.value) for name in ("quark_mxfp4", "fp8_per_channel", "int8_per_channel"))


def test_pattern_that_matches_nothing(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    policy = QuantizationPolicy(ignore=("model.layers.99.*",))
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING, "quantload"):
        warnings.simplefilter("always")
        model = load_quantized(checkpoint("llama"), policy=policy)
    told = [str(warning.message) for warning in warned] + caplog.messages
    assert any("model.layers.99.*" in message for message in told)
    assert model.load_report.layers
    with pytest.raises(e.UnmatchedPatternError, match=re.escape("model.layers.99.*")):
        load_quantized(checkpoint("llama"), policy=policy, options=LoadOptions(strict=True))


def test_pattern_that_is_no_regular_expression(checkpoint: Checkpoint) -> None:
    with pytest.raises(e.PolicyError, match=re.escape("re:(")):
        load_quantized(checkpoint("llama"), policy=QuantizationPolicy(ignore=("re:(",)))


def test_budget_too_small(checkpoint: Checkpoint) -> None:
    with pytest.raises(e.MemoryBudgetError) as caught:
        load_quantized(checkpoint("llama"), options=LoadOptions(max_memory=100_000))
    assert len(re.findall(r"\d", str(caught.value))) >= 2
    assert "max" in str(caught.value).lower() or "limit" in str(caught.value).lower()


def test_error_raised_by_the_progress_callback_ends_the_load(checkpoint: Checkpoint) -> None:
    def progress(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError):
        load_quantized(checkpoint("qwen3_moe"), progress=progress)


# -- command line ---------------------------------------------------------------------------------------------------


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    from quantload import cli

    monkeypatch.setattr("sys.argv", ["quantload", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize("command", ["load", "plan"])
def test_exit_codes(
    command: str, llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, command, llama, "--json") == 0
    assert isinstance(json.loads(capfd.readouterr().out), dict)

    assert run_cli(monkeypatch, command, llama, "--quantization", "mxfp5") == 2
    assert "quark_mxfp4" in capfd.readouterr().err
    assert run_cli(monkeypatch, command, llama, "--no-such-option") == 2
    capfd.readouterr()
    if command == "load":
        assert run_cli(monkeypatch, command, llama, "--max-memory", "100000B") == 4
        assert "Traceback" not in capfd.readouterr().err

    (llama / raw_checkpoint.SINGLE).write_bytes(b"\x01")
    assert run_cli(monkeypatch, command, llama, "--json") == 3
    captured = capfd.readouterr()
    assert raw_checkpoint.SINGLE in captured.err.replace("\n", "")
    assert "Traceback" not in captured.err
    assert captured.out.strip() == "" or isinstance(json.loads(captured.out), dict)
