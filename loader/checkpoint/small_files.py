"""The small files of a checkpoint: regular files of a bounded size, looked at before anything opens them."""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..kernels.system_calls import open_plain
from .quantization_config import FILES as QUANTIZATION_FILES

MIB = 1 << 20
MAX_CONFIG_BYTES = 16 * MIB
MAX_CODE_BYTES = 16 * MIB
MAX_VALUES = 1 << 19
"""Values of a JSON file, names included."""
MAX_MODEL_VALUES = 1 << 17
"""Values of a config without its `quantization_config`; transformers takes up to a kilobyte for each."""
_QUANTIZATION = ("quantization_config", "compression_config")
MAX_DEPTH = 64
MAX_INTEGER = 1 << 127

MODEL_FILES = {
    **dict.fromkeys(("config.json", *QUANTIZATION_FILES), MAX_CONFIG_BYTES),
    "generation_config.json": MIB,
}
"""What is read to build a model, with the most bytes of each."""
PROCESSOR_FILES = {
    **dict.fromkeys(
        (
            *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "processor_config.json"),
            *("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json", "*.jinja"),
        ),
        MAX_CONFIG_BYTES,
    ),
    **dict.fromkeys(
        ("tokenizer.json", "vocab.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer"), 256 * MIB
    ),
}
"""What tokenizers and processors are read from, with the most bytes of each."""


def largest_allowed(name: str) -> int:
    """The most bytes that a small file of such a name may have."""
    limits = ((each, limit) for files in (MODEL_FILES, PROCESSOR_FILES) for each, limit in files.items())
    return next((limit for each, limit in limits if fnmatch.fnmatchcase(name, each)), MAX_CODE_BYTES)


def read_small_file(path: Path, limit: int) -> bytes | None:
    """The content of a regular file, `None` without one; raises `CheckpointError` for other kinds and more bytes.

    Links are followed. Nothing but a regular file is opened: a FIFO would wait for ever, a device may do anything.
    """
    try:
        if not check_small_file(path, limit):
            return None
        # Non-blocking, should it be something else by now.
        with open(open_plain(path, os.O_RDONLY), "rb") as file:
            _check(path, os.fstat(file.fileno()), limit)
            content = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise _too_large(path, len(content), limit)
    return content


def check_small_file(path: Path, limit: int) -> bool:
    """Whether there is such a file; raises `CheckpointError` for one that is not regular, or has more bytes."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    _check(path, status, limit)
    return True


def check_small_files(root: Path, limits: dict[str, int]) -> None:
    """Raise `CheckpointError` for a file of the folder `root` that `limits` (bytes by name or glob) do not allow."""
    try:
        names = os.listdir(root)
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}") from error
    for name in sorted(names):
        for pattern, limit in limits.items():
            if fnmatch.fnmatchcase(name, pattern):
                check_small_file(root / name, limit)


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """The object a JSON file holds, `None` without the file; raises `CheckpointError` for anything else.

    As in transformers the last of equal keys counts, and NaN and Infinity are numbers.
    """
    content = read_small_file(path, limit)
    if content is None:
        return None
    check_values(path, content)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    _check_nested(path, found, MAX_DEPTH)
    values = _count(found)
    if values > MAX_MODEL_VALUES:
        raise CheckpointError(f"{path}: has {values:,} values, more than the {MAX_MODEL_VALUES:,} of a model's config")
    return found


def check_values(path: Path, content: bytes, most: int = MAX_VALUES) -> None:
    """Raise `CheckpointError` for JSON that may have more than `most` values."""
    values = _separators(content)
    if values > most:
        raise CheckpointError(f"{path}: has up to {values:,} values, more than the {most:,} that such a file may have")


def count_values(path: Path, limit: int = MAX_CONFIG_BYTES) -> int:
    """How many values a JSON file has at most, names included; none without the file."""
    content = read_small_file(path, limit)
    return 0 if content is None else _separators(content)


def _separators(content: bytes) -> int:
    return sum(map(content.count, (b",", b"[", b"{", b":")))


def _check(path: Path, status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is {_kind(status.st_mode)}, not a regular file; put the file itself there")
    if status.st_size > limit:
        raise _too_large(path, status.st_size, limit)


def _too_large(path: Path, size: int, limit: int) -> CheckpointError:
    return CheckpointError(f"{path}: {size:,} bytes or more, larger than the {limit:,} that such a file may have")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _count(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 1
    if isinstance(value, dict):
        return 1 + sum(_count(inner) for name, inner in value.items() if name not in _QUANTIZATION)
    return 1 + sum(map(_count, value))


def _check_nested(path: Path, value: Any, depth: int) -> None:
    if depth == 0:
        raise CheckpointError(f"{path}: objects and lists stand in each other more than {MAX_DEPTH} deep")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, (dict, list)):
            _check_nested(path, inner, depth - 1)
        elif isinstance(inner, int) and abs(inner) >= MAX_INTEGER:
            raise CheckpointError(f"{path}: {str(key)[:200]} has an integer of {inner.bit_length()} bits")
