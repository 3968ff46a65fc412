"""What an entry is found by: a digest of everything that decides about its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import transformers

from ..checkpoint.index import shard_names
from ..checkpoint.paths import locate
from ..checkpoint.resolve import Checkpoint
from ..checkpoint.small_files import MAX_CODE_BYTES, read_small_file
from ..checkpoint.source import FileSource
from ..kernels import system_calls
from ..model.skeleton import Assignment
from ..options import CacheVerify, QuantizationPolicy
from ..schemes.registry import get_entry

QUANTIZATION_VERSION = 1
"""Of the rules that make codes and scales; raise it with every change after which a scheme gives other bytes."""
STORED_VERSION = 1
"""Of the layout of tensors in an entry, as `quantization_config` describes it."""
_HEADER_AT_ONCE = _READ_AT_ONCE = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def entry_key(
    checkpoint: Checkpoint,
    policy: QuantizationPolicy,
    assignments: Iterable[Assignment],
    trust_remote_code: bool,
    verify: CacheVerify = "samples",
) -> str:
    """The key of what a load of `checkpoint` leaves in memory: 64 hexadecimal digits.

    `assignments` are what the policy made of the model on the device it goes to.
    The files of the checkpoint count with their headers, sizes, times of change (ns) and samples of their weights:
    times alone are equal where they were set, as in archives and images made to be reproducible. With `verify` full
    they count with all of their content, and not with their times. The folder they lie in does not count. How a load
    runs, which kernels, pieces and workers it uses and what it measures,
    does not change a byte, and does not count either. Raises `CheckpointError` as `read_index` would.
    """
    facts = {
        "versions": [STORED_VERSION, QUANTIZATION_VERSION, transformers.__version__],  # that one says what is fused how
        "shards": list(_contents(checkpoint) if verify == "full" else _shards(checkpoint)),
        "config": checkpoint.config(),
        "code": _modeling_code(checkpoint.root) if trust_remote_code else None,
        "policy": _policy(policy),
        "modules": dict(_modules(assignments)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _shards(checkpoint: Checkpoint) -> Iterator[tuple[str, int, int]]:
    identities = checkpoint.identities
    with FileSource(checkpoint.root, page_cache="keep", identities=identities) as source:
        for name in shard_names(checkpoint, source):
            size = source.size(name)
            with locate(checkpoint.root, name).open("rb") as file:
                identities.compare(name, os.fstat(file.fileno()))
                yield _digest(file, size), size, identities[name].mtime_ns


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """Of every byte; the page cache is left as it was."""
    with FileSource(checkpoint.root, identities=checkpoint.identities) as source:
        buffer = memoryview(bytearray(_READ_AT_ONCE))
        for name in shard_names(checkpoint, source):
            digest, size = hashlib.sha256(), source.size(name)
            for offset in range(0, size, len(buffer)):
                part = buffer[: size - offset]
                source.read_into(name, offset, part)
                digest.update(part)
                source.release(name, offset, len(part))
            yield digest.hexdigest(), size


def _digest(file: BinaryIO, size: int) -> str:
    """Of the header, and of pages of 4 KiB spread evenly over the file: two trainings of one model differ there."""
    digest = hashlib.sha256()
    length = file.read(8)
    digest.update(length)
    left = int.from_bytes(length, "little")
    while left and (part := file.read(min(left, _HEADER_AT_ONCE))):
        digest.update(part)
        left -= len(part)
    samples = range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES // _SAMPLE_BYTES * _SAMPLE_BYTES))
    for offset in samples:  # asked for all at once: a disk or a network answers them side by side
        system_calls.advise(file.fileno(), offset, _SAMPLE_BYTES, system_calls.WILLNEED)
    for offset in samples:
        digest.update(system_calls.pread(file.fileno(), _SAMPLE_BYTES, offset))
    return digest.hexdigest()


def _modeling_code(root: Path) -> Mapping[str, str]:
    return {
        path.name: hashlib.sha256(read_small_file(path, MAX_CODE_BYTES) or b"").hexdigest()
        for path in sorted(root.glob("*.py"))
    }


def _policy(policy: QuantizationPolicy) -> dict[str, Any]:
    """The policy with one spelling for what means the same; a field that is new some day counts as it is."""
    return asdict(policy) | {
        "linear": get_entry(policy.linear).name,
        "experts": get_entry(policy.experts or policy.linear).name,
        "ignore": sorted(set(policy.ignore)),
        "overrides": [(pattern, get_entry(scheme).name) for pattern, scheme in policy.overrides],
    }


def _modules(assignments: Iterable[Assignment]) -> Iterator[tuple[str, Any]]:
    """Scheme, format and shapes of what is quantized: a device may store a format, or pad it, in its own way."""
    for assignment in assignments:
        if assignment.scheme is not None:
            layouts = assignment.scheme.layouts(assignment.module).items()
            stored = [(key, each.format.name, *each.shapes) for key, each in layouts]
            yield assignment.name, [assignment.scheme.name, stored]
