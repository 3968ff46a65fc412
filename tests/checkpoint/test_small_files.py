"""Small files are regular, of a bounded size, and looked at before anything opens them."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.small_files import (
    MAX_CONFIG_BYTES,
    MIB,
    MODEL_FILES,
    PROCESSOR_FILES,
    check_small_files,
    read_json_object,
    read_small_file,
)
from quantload.errors import CheckpointError


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "a folder": _folder,
    "a device": _device,
    "cannot be read: Too many levels of symbolic links": _link_to_itself,
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "name", [*MODEL_FILES, "tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja"]
)
@pytest.mark.parametrize(("says", "make"), KINDS.items())
def test_what_is_no_regular_file_is_never_opened(
    says: str, make: Callable[[Path], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is at most 108 bytes
    make(Path(name))
    attempts: tuple[Callable[[], object], ...] = (
        lambda: check_small_files(tmp_path, MODEL_FILES | PROCESSOR_FILES),
        lambda: read_json_object(tmp_path / name),
    )
    for attempt in attempts:
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path / name))}: .*{says}"):
            attempt()


def test_links_to_files_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert resolve(tmp_path).config() == {"a": 1}
    (tmp_path / "generation_config.json").symlink_to("nowhere")
    check_small_files(tmp_path, MODEL_FILES)
    assert read_small_file(tmp_path / "generation_config.json", 10) is None


@pytest.mark.parametrize(
    ("name", "limit"), (MODEL_FILES | {"tokenizer.json": PROCESSOR_FILES["tokenizer.json"]}).items()
)
def test_a_file_that_is_too_large_is_refused_unread(name: str, limit: int, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises(CheckpointError, match=f"{name}: {limit + 1:,} bytes or more, larger than the {limit:,} that"):
        check_small_files(tmp_path, MODEL_FILES | PROCESSOR_FILES)
    with pytest.raises(CheckpointError, match=f"larger than the {limit:,}"):
        read_small_file(tmp_path / name, limit)


def test_a_file_may_say_that_it_is_empty_and_go_on() -> None:
    with pytest.raises(CheckpointError, match="larger than the 100 that"):
        read_small_file(Path("/proc/self/status"), 100)


def test_other_names_are_nobodys_business(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trainer_state.json")
    check_small_files(tmp_path, MODEL_FILES | PROCESSOR_FILES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "more than 64 deep"),
        (b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"many": [1' + b"0" * 40 + b"]}", "0 has an integer of 133 bits"),
        (b'{"many": -1' + b"0" * 400 + b"}", "many has an integer of 1329 bits"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": [' + b"0," * (1 << 19) + b"0]}", "has up to 524,291 values, more than the 524,288"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"null", "holds a NoneType, expected a JSON object"),
    ],
    ids=range(12),
)
def test_json_that_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: .*{says}"):
        read_json_object(tmp_path / "config.json")


def test_json_means_what_it_means_in_transformers(tmp_path: Path) -> None:
    content = '{"a": 1, "a": 2, "time_step_limit": [0.0, Infinity], "big": 1' + "0" * 30 + "}"
    (tmp_path / "config.json").write_text(content)
    assert read_json_object(tmp_path / "config.json") == json.loads(content)
    assert json.loads(content)["a"] == 2


def test_as_many_values_as_a_large_config_has_are_read(tmp_path: Path) -> None:
    config = {"quantization_config": {f"model.layers.{number}": {"bits": 4, "group": 128} for number in range(30_000)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MIB < (tmp_path / "config.json").stat().st_size < MAX_CONFIG_BYTES
    assert read_json_object(tmp_path / "config.json") == config
