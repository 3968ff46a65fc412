"""The key of an entry: another one for everything that changes a byte, and for nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantload import plan_quantized
from quantload.cache import key as key_module
from quantload.cache.key import entry_key
from quantload.checkpoint.resolve import resolve
from quantload.errors import MissingShardError
from quantload.geometry.layout import WeightLayout
from quantload.kernels.formats import FP8_CHANNEL, FP8_CHANNEL_FNUZ, WeightFormat
from quantload.options import LoadOptions, QuantizationPolicy
from safetensors.torch import load_file, save_file

POLICY = QuantizationPolicy(ignore=("a", "b"), overrides=(("c", "fp8_per_channel"), ("d", "none")))


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))  # times of change stay


def key_of(
    folder: Path, policy: QuantizationPolicy = POLICY, options: LoadOptions | None = None, trust: bool = False
) -> str:
    draft = plan_quantized(folder, policy=policy, options=options)
    return entry_key(resolve(folder), draft.rules.policy, draft.assignments, trust)


def key_of_files(folder: Path, policy: QuantizationPolicy = POLICY) -> str:
    """The key by files and policy alone, whether or not they can be loaded."""
    return entry_key(resolve(folder), policy, [], False)


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def touch(folder: Path) -> None:
    os.utime(shard(folder), (1, 1))


def rename_a_tensor(folder: Path) -> None:
    status, data = shard(folder).stat(), shard(folder).read_bytes()
    shard(folder).write_bytes(data.replace(b"layers.0", b"layers.7", 1))
    os.utime(shard(folder), ns=(status.st_atime_ns, status.st_mtime_ns))


def train(folder: Path) -> None:
    """Other weights of the same shapes under the same time, as archives and images with set times hold them."""
    status, tensors = shard(folder).stat(), load_file(shard(folder))
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, shard(folder), {"format": "pt"})
    os.utime(shard(folder), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard(folder).stat().st_size == status.st_size


def grow(folder: Path) -> None:
    status = shard(folder).stat()
    with shard(folder).open("ab") as file:
        file.write(b"\0")
    os.utime(shard(folder), ns=(status.st_atime_ns, status.st_mtime_ns))


def split(folder: Path) -> None:
    tensors = list(load_file(shard(folder)).items())
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map: dict[str, str] = {}
    for name, part in zip(names, (tensors[:3], tensors[3:]), strict=True):
        save_file(dict(part), folder / name)
        weight_map |= {tensor: name for tensor, _ in part}
    shard(folder).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))


@pytest.mark.parametrize("change", [touch, rename_a_tensor, train, grow, split, change_config])
def test_another_checkpoint_has_another_key(folder: Path, change: Callable[[Path], None]) -> None:
    before = key_of_files(folder)
    change(folder)
    assert key_of_files(folder) != before


def change_one_bit_under_the_same_time(folder: Path, position: int) -> None:
    status, data = shard(folder).stat(), bytearray(shard(folder).read_bytes())
    data[position] ^= 1
    shard(folder).write_bytes(data)
    os.utime(shard(folder), ns=(status.st_atime_ns, status.st_mtime_ns))


def test_full_verification_sees_what_samples_do_not(folder: Path) -> None:
    """One bit between the pages that are sampled, under the same time; and content that is the same under another."""
    save_file({"weight": torch.zeros(64, 4096)}, shard(folder))  # 1 MiB: a page in four is sampled

    def keys() -> list[str]:
        return [entry_key(resolve(folder), POLICY, [], False, verify) for verify in ("samples", "full")]

    before = keys()
    change_one_bit_under_the_same_time(folder, position=6000)
    after = keys()
    assert after[0] == before[0]
    assert after[1] != before[1]
    touch(folder)
    touched = keys()
    assert touched[0] != after[0]
    assert touched[1] == after[1]
    assert len({*before, *after}) == 3


def test_a_shard_has_its_part_in_the_key(folder: Path) -> None:
    split(folder)
    before = key_of(folder)
    os.utime(folder / "model-00002-of-00002.safetensors", (1, 1))
    assert key_of(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        {"linear": "int8_per_channel", "experts": "quark_mxfp4"},
        {"experts": "int8_per_channel"},
        {"ignore": ("a",)},
        {"overrides": POLICY.overrides[:1]},
        {"overrides": POLICY.overrides[::-1]},
        {"overrides": (("c", "fp8_per_tensor"), ("d", "none"))},
        {"default_ignore": False},
        {"scale_mode": "mse"},
    ],
)
def test_another_policy_has_another_key(folder: Path, change: dict[str, Any]) -> None:
    assert key_of_files(folder, replace(POLICY, **change)) != key_of_files(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"experts": "quark_mxfp4"},
        {"ignore": ("b", "a", "b")},
        {"overrides": (("c", "ptpc_fp8"), ("d", "none"))},
    ],
)
def test_the_same_policy_in_other_words_has_the_same_key(folder: Path, change: dict[str, Any]) -> None:
    assert key_of(folder, replace(POLICY, **change)) == key_of(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 4096},
        {"staging_bytes": 1 << 30},
        {"max_memory": 1 << 40},
        {"workers": 1},
        {"page_cache": "drop"},
        {"connections": 2},
        {"stats": False},
        {"retries": 0},
        {"force": True},
        {"activations": "none"},
        {"kernels": {"quantize": "torch"}},
    ],
)
def test_how_a_load_runs_does_not_change_the_key(folder: Path, options: dict[str, Any]) -> None:
    assert key_of(folder, options=LoadOptions.from_mapping(options)) == key_of(folder)


def test_strictness_does_not_change_the_key(folder: Path) -> None:
    policy = QuantizationPolicy()
    assert key_of(folder, policy, LoadOptions(strict=True)) == key_of(folder, policy)


def test_every_option_is_known_not_to_change_a_byte_or_to_be_in_the_key() -> None:
    """Who adds an option decides which of the two it is, here and in the lists above."""
    assert set(LoadOptions.__dataclass_fields__) - {"cache", "cache_bytes", "cache_verify"} == {
        "chunk_bytes", "staging_bytes", "max_memory", "workers", "page_cache", "stats", "strict", "retries", "digest",
        "activations", "kernels", "force", "connections", "memory_scope",
        # The policy that these lead to is in the key:
        "fit", "fit_context", "fit_requests", "fit_sensitivity", "fit_head",
    }  # fmt: skip
    assert set(QuantizationPolicy.__dataclass_fields__) == {
        "linear", "experts", "ignore", "overrides", "default_ignore", "scale_mode",
    }  # fmt: skip


def test_where_the_checkpoint_lies_does_not_change_the_key(folder: Path) -> None:
    before = key_of(folder)
    copy = shutil.copytree(folder, folder.parent / "elsewhere")
    assert key_of(copy) == before


def test_other_small_files_do_not_change_the_key(folder: Path) -> None:
    before = key_of(folder)
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("hello")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()), indent=7))
    assert key_of(folder) == before


def test_the_code_of_a_checkpoint_counts_where_it_is_run(folder: Path) -> None:
    before, trusted = key_of(folder), key_of(folder, trust=True)
    (folder / "modeling.py").write_text("pass")
    assert key_of(folder) == before
    assert key_of(folder, trust=True) != trusted


@pytest.mark.parametrize("name", ["QUANTIZATION_VERSION", "STORED_VERSION"])
def test_other_rules_have_another_key(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(folder)
    monkeypatch.setattr(key_module, name, 1000)
    assert key_of(folder) != before


def test_another_transformers_may_fuse_weights_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(folder)
    monkeypatch.setattr(key_module, "transformers", SimpleNamespace(__version__="5.99"))
    assert key_of(folder) != before


def assignment(
    name: str, scheme: str | None, fmt: WeightFormat = FP8_CHANNEL, multiples: tuple[int, int] = (1, 1)
) -> Any:
    layouts = {"weight": WeightLayout(fmt, None, (("", 3),), 32, multiples)}
    made = scheme and SimpleNamespace(name=scheme, layouts=lambda module: layouts)
    return SimpleNamespace(name=name, module=None, scheme=made)


def test_what_is_made_of_each_module_has_its_part_in_the_key(folder: Path) -> None:
    """A device may store a format in its own way; a release may give a module another scheme under the same policy."""
    made = (
        [assignment("a", "fp8"), assignment("b", None)],
        [assignment("a", "fp8", FP8_CHANNEL_FNUZ), assignment("b", None)],
        [assignment("a", "int8"), assignment("b", None)],
        [assignment("b", "fp8"), assignment("a", None)],
        [assignment("a", "fp8", multiples=(4, 1)), assignment("b", None)],
    )
    assert len({entry_key(resolve(folder), POLICY, each, False) for each in made}) == len(made)


def test_a_missing_shard_is_the_error_it_is_without_a_cache(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingShardError):
        key_of_files(folder)
