"""Tokenizers and chat templates are tried before a weight is read, in a process that may hang, swell and die."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import quantload
from quantload.checkpoint.resolve import resolve
from quantload.errors import CheckpointError
from quantload.server import processors
from quantload.server.processors import check_processor, try_processor
from quantload.tokenizer import chat_templates, load_processor

DEMO = Path(quantload.__file__).parent / "demo_model"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def configured(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.x.y }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ messages.__class__.__mro__[1] }}", "SecurityError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ '\\ud800' }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_named(folder: Path, template: str, why: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=rf"{folder}/chat_template.jinja: rendering .* failed: .*{why}"):
        try_processor(resolve(folder), False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('give me a document') }}",
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] + '' }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_may_refuse_or_want_parts(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    try_processor(resolve(folder), False)


def test_a_template_is_not_needed(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    try_processor(resolve(folder), False)
    assert chat_templates(load_processor(resolve(folder), False)) == []


@pytest.mark.parametrize("template", [5, {"default": 5}, {"default": "{% if %}"}])
def test_a_template_of_the_config_is_named_by_its_file(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    configured(folder, chat_template=template)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        try_processor(resolve(folder), False)


def test_how_answers_are_parsed_is_tried(folder: Path) -> None:
    configured(folder, response_template={"nonsense": 1})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: parsing an answer .*nonsense"):
        try_processor(resolve(folder), False)


def test_a_folder_without_a_tokenizer_is_told_what_is_missing(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer; put its tokenizer\.json"):
        try_processor(resolve(folder), False)


def test_a_file_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[" * 5000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        try_processor(resolve(folder), False)


def test_a_tokenizer_that_cannot_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        __module__ = "pyo3_runtime"

    def decode(*_: Any, **__: Any) -> str:
        raise Panic("index out of bounds")

    real = load_processor(resolve(folder), False)
    monkeypatch.setattr(type(real), "decode", decode)
    with pytest.raises(CheckpointError, match=r"decoding text with .*tokenizer\.json.* failed: Panic: index"):
        try_processor(resolve(folder), False)


def test_another_process_tries_it_and_says_what_is_wrong(folder: Path) -> None:
    check_processor(resolve(folder), False, method="fork")
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10 ** 11 }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: rendering .* failed: MemoryError"):
        check_processor(resolve(folder), False, method="fork")


def test_a_template_without_an_end_is_given_up(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(ENDLESS)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: rendering .* took too long.* 0\.5 s"):
        check_processor(resolve(folder), False, seconds=0.5, method="fork")
    assert time.monotonic() - begin < 10


def test_a_process_that_dies_is_no_end_of_this_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(_: Any) -> None:
        faulthandler.disable()
        os.abort()

    monkeypatch.setattr(processors, "_try_tokenizer", abort)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.* ended the process by SIGABRT"):
        check_processor(resolve(folder), False, method="fork")


@pytest.mark.slow
def test_a_process_that_is_started_anew_says_the_same(folder: Path) -> None:
    check_processor(resolve(folder), False, method="spawn")
    (folder / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: rendering .* failed: ZeroDivisionError"):
        check_processor(resolve(folder), False, method="spawn")
