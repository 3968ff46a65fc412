"""What an entry is found by: a digest of everything that decides about its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from ..checkpoint.folder import Checkpoint
from ..checkpoint.index import shard_names
from ..checkpoint.small_files import MAX_CODE_BYTES, read_small_file
from ..model.skeleton import Assignment
from ..options import CacheVerify, LoadOptions, QuantizationPolicy
from ..schemes.registry import get_entry

QUANTIZATION_VERSION = 1
"""Of the rules that make codes and scales; raise it with every change after which a scheme gives other bytes."""
STORED_VERSION = 1
"""Of the layout of tensors in an entry, as `quantization_config` describes it."""
_READ_AT_ONCE = 1 << 20


def entry_key(
    checkpoint: Checkpoint,
    policy: QuantizationPolicy,
    assignments: Iterable[Assignment],
    trust_remote_code: bool,
    verify: CacheVerify = "samples",
    part: tuple[int, int, bool] | None = None,
) -> str:
    """The key of what a load of `checkpoint` leaves in memory: 64 hexadecimal digits.

    `assignments` are what the policy made of the model on the device it goes to.
    The files of the checkpoint count with their headers, sizes, times of change (ns) and samples of their weights:
    times alone are equal where they were set, as in archives and images made to be reproducible. Those that are
    elsewhere count with their address and what their server says of their versions, which are versions of that address.
    With `verify` full all count with all of their content, and with neither times nor addresses. The folder of local
    ones does not count. How a load runs, which kernels, pieces and workers it uses and what it measures, does not
    change a byte, and does not count either. `part` says which part of the model it is of, where several ranks have one
    each. Raises `CheckpointError` as `read_index` would.
    """
    facts = {
        "versions": [STORED_VERSION, QUANTIZATION_VERSION, transformers.__version__],  # that one says what is fused how
        "shards": list(_contents(checkpoint) if verify == "full" else _shards(checkpoint)),
        "config": checkpoint.config(),
        "code": _modeling_code(checkpoint.root) if trust_remote_code else None,
        "policy": _policy(policy),
        "modules": dict(_modules(assignments)),
    }
    if part is not None:
        facts["part"] = [*part]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _shards(checkpoint: Checkpoint) -> Iterator[tuple[str | int | None, ...]]:
    with closing(checkpoint.files.source(LoadOptions(page_cache="keep"))) as source:
        for name in shard_names(checkpoint, source):
            source.size(name)  # the error for one that is missing
            yield checkpoint.files.fingerprint(name)


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """Of every byte; the page cache is left as it was."""
    with closing(checkpoint.files.source()) as source:
        buffer = memoryview(bytearray(_READ_AT_ONCE))
        for name in shard_names(checkpoint, source):
            digest, size = hashlib.sha256(), source.size(name)
            for offset in range(0, size, len(buffer)):
                part = buffer[: size - offset]
                source.read_into(name, offset, part)
                digest.update(part)
                source.release(name, offset, len(part))
            yield digest.hexdigest(), size


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
