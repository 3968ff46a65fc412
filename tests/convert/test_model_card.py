"""The model card and the license files of a converted checkpoint, and what is said at its end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # what transformers and the hub read cards with
from huggingface_hub import ModelCard
from quantload import LoadOptions, QuantizationPolicy, cli, convert_checkpoint
from quantload.checkpoint.folder import Checkpoint
from quantload.convert.model_card import Conversion, base_model, command_line, license_files, model_card
from quantload.errors import UnsafePathError
from quantload.memory.report import LoadReport
from quantload.schemes.exported.registry import EXPORT_FORMATS

SAID = Conversion("quantload convert org/m out", "quark_mxfp4", "quark", "7 linear layers in MXFP4; 1 is.", ["vLLM"])
ORIGINAL = """---
license: apache-2.0
language:
- en
# a comment
tags: [chat, "code"]
base_model: org/older
model-index:
- name: m
  results:
  - task: {type: text-generation}
extra_gated_prompt: |
  Accept this: or not.
---
# The model

It is --- good.
"""


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_front_matter_of_the_original_stays_but_for_what_is_another_now() -> None:
    card = model_card(ORIGINAL, "org/m", True, SAID)
    assert front_matter(card) == {
        "base_model": "org/m", "base_model_relation": "quantized", "quantization": "quark_mxfp4",
        "tags": ["quantload", "quark_mxfp4", "chat", "code"], "license": "apache-2.0", "language": ["en"],
        "extra_gated_prompt": "Accept this: or not.\n",
    }  # fmt: skip
    assert card.endswith("# The model\n\nIt is --- good.\n")
    assert f"[org/m](https://huggingface.co/org/m) with quantload {metadata.version('quantload')}" in card
    assert "```\nquantload convert org/m out\n```" in card
    assert "Read by: vLLM." in card
    assert "base_model: org/m" in str(ModelCard(card).data)


@pytest.mark.parametrize("tags", ["tags:\n- a\n- 'b c'", "tags:\n  - a\n  - b c", "tags: [a, 'b c']"])
def test_tags_are_added_to_those_there_are(tags: str) -> None:
    card = model_card(f"---\n{tags}\n---\ntext", "m", False, SAID)
    assert front_matter(card)["tags"] == ["quantload", "quark_mxfp4", "a", "b c"]


@pytest.mark.parametrize(
    "original",
    [
        "no front matter",
        "---\nnever ended: yes\n",
        "---\n[1, 2]\n---\n",
        "---\na: 1\na: 2\n---\n",
        "---\n\x00: {\n---\n",
        "\ufeff---\r\nlicense: mit\r\n---\r\ntext\r\n",
    ],
)
def test_whatever_the_original_is_the_card_has_a_front_matter_and_its_text(original: str) -> None:
    card = model_card(original, 'a "quoted" name', False, SAID)
    assert front_matter(card)["base_model"] == 'a "quoted" name'
    assert original.strip("\ufeff\r\n-").splitlines()[-1].strip() in card


def test_aliases_in_a_front_matter_are_not_expanded() -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 60))
    card = model_card(f"---\nl0: &l0 [x]\n{levels}---\ntext", "m", False, SAID)
    assert len(card) < 10_000


def test_without_a_card_one_is_written() -> None:
    card = model_card(None, "org/m", False, SAID)
    assert "\n# m, quantized\n" in card
    assert "What follows" not in card
    assert front_matter(card)["tags"] == ["quantload", "quark_mxfp4"]


def test_the_base_model_is_a_hub_id_or_the_name_of_a_folder(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--a-model/snapshots/0123"
    assert base_model(Checkpoint(snapshot, "org/a-model")) == ("org/a-model", True)
    assert base_model(Checkpoint(tmp_path / "mine", "../mine")) == ("mine", False)


def test_the_command_can_be_given_again(tmp_path: Path) -> None:
    policy = QuantizationPolicy(
        "mxfp8", "int8", ("*.a b",), (("re:x$", "none"),), default_ignore=False, scale_mode="mse"
    )
    checkpoint = Checkpoint(tmp_path / "my model", "m")
    words = shlex.split(command_line(checkpoint, "auto", "quark", policy))
    assert words == [
        "quantload", "convert", "my model", "OUT", "-q", "mxfp8", "--format", "quark", "--experts", "int8", "--ignore",
        "*.a b", "--override", "re:x$=none", "--no-default-ignore", "--scale-mode", "mse",
    ]  # fmt: skip
    assert shlex.split(command_line(checkpoint, "fp8_per_channel", "quark", None))[5] == "fp8_per_channel"


LICENSES = ("LICENSE", "license.md", "LICENCE-CODE", "Notice.rst", "COPYING", "USE_POLICY.md")


@pytest.fixture
def source(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint with a card and licenses beside its weights."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        (folder / path.name).hardlink_to(path)
    for name in (*LICENSES, "license.safetensors.txt"):
        (folder / name).write_text(f"terms of {name}")
    (folder / "README.md").write_text(ORIGINAL)
    return folder


def test_license_files_are_known_by_their_names(source: Path) -> None:
    (source / "license.bin").write_text("no license")
    (source / "unlicensed").write_text("neither")
    assert license_files(source) == sorted((*LICENSES, "license.safetensors.txt"))


def test_a_conversion_copies_licenses_and_says_where_what_it_made_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "out", tmp_path / "report.json"
    arguments = ["quantload", "convert", str(source), str(out), "-q", "fp8_per_channel", "--report", str(saved)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out.splitlines()
    report = LoadReport.load(saved)
    factor = report.checkpoint_bytes / report.final_bytes
    assert report.output_bytes == sum(path.stat().st_size for path in out.rglob("*"))
    assert any(line.startswith(f"wrote {out}: ") and f"{factor:.2f} times smaller" in line for line in printed)
    assert "read by: transformers with AMD Quark, vLLM, quantload" in printed
    assert report.documents == sorted((*LICENSES, "README.md"))  # license.safetensors.txt is among the small files
    for name in (*LICENSES, "license.safetensors.txt"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    fields = front_matter((out / "README.md").read_text())
    assert (fields["base_model"], fields["quantization"]) == ("source", "fp8_per_channel")
    card = (out / "README.md").read_text()
    assert "\nquantload convert source OUT -q fp8_per_channel --format quark\n" in card
    assert str(tmp_path) not in card
    assert "14 linear layers in fp8_per_channel; modules that are as they were: 1." in card
    assert json.loads((out / "config.json").read_text())["quantization_config"]


def test_no_card_and_no_license_where_they_are_not_wanted(source: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(source, tmp_path / "out", "mxfp4", model_card=False)
    assert report.documents == []
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {*LICENSES, "README.md"}


def test_a_license_that_is_a_link_out_of_the_folder_is_refused_and_a_huge_one_left_out(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (source / "COPYING").open("r+b") as file:
        file.truncate(5 << 20)
    report = convert_checkpoint(source, tmp_path / "out", "mxfp4", options=LoadOptions(stats=False))
    assert "COPYING" not in report.documents
    assert "COPYING is larger than 4.000 MiB and is not copied" in caplog.text
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePathError, match="LICENSE"):
        convert_checkpoint(source, tmp_path / "other", "mxfp4")


@pytest.mark.parametrize(
    ("form", "linear", "experts", "tools"),
    [
        ("quark", "mxfp4", None, ["transformers with AMD Quark", "vLLM", "quantload"]),
        ("quark", "mxfp4", "mxfp4", ["vLLM", "quantload"]),
        ("compressed-tensors", "fp8_channel", "fp8_channel",
         ["transformers with compressed-tensors", "vLLM", "quantload"]),
        ("compressed-tensors", "fp8_channel", "int8_channel", ["vLLM", "quantload"]),
        ("compressed-tensors", "int4_group128_f16", None, ["vLLM", "quantload"]),
        ("compressed-tensors", "mxfp6_e2m3", None, ["transformers with compressed-tensors", "quantload"]),
        ("mxfp4", None, "mxfp4", ["transformers", "quantload"]),
        ("modelopt", "nvfp4", None, ["quantload"]),
    ],
)  # fmt: skip
def test_what_reads_a_checkpoint_is_what_was_seen_to(
    form: str, linear: str | None, experts: str | None, tools: list[str]
) -> None:
    kinds = ([linear] if linear else [], [experts] if experts else [])
    assert EXPORT_FORMATS[form].read_by(*kinds) == tools
