"""A digest of the tensors of a loaded model: one hash that is equal exactly where names, types, shapes and bytes are.

It is the SHA-256 of one line of JSON for each entry of `state_dict()`, in the order of their names (by code points):

    ["name","dtype",[shape],"SHA-256 of the bytes"]

without spaces, in UTF-8, each ended by a line feed. Dtypes are called as in safetensors files, bytes are those of the
elements in row-major order, little-endian, as such a file would have them. Codes and scales count in their canonical
places and without padding, wherever a kernel of this machine wants them. Where they are stored has no part in it: a
tensor with two names is two lines, whether the names share memory or not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.crew import Crew, Stopped
from .checkpoint.headers import DTYPES
from .schemes.base import LinearScheme, MoEScheme

CHUNK_BYTES = 8 << 20
"""Hashed at once, and copied at once where a tensor is not contiguous or not on the host."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def model_digest(model: nn.Module, workers: int) -> tuple[str, float]:
    """The digest, as `sha256:` and 64 hexadecimal digits, and the seconds it took, on so many threads.

    Beside the model it takes a chunk a thread; where a kernel keeps codes elsewhere, the canonical copy of one weight.
    """
    start = time.perf_counter()
    entries = _entries(model)
    lines = _lines(entries, max(1, min(workers, len(entries))))
    total = hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode())
    return f"sha256:{total.hexdigest()}", time.perf_counter() - start


@dataclass(frozen=True)
class _Entry:
    """A tensor by all its names, and what gives it in its canonical form."""

    names: list[str]
    nbytes: int
    canonical: Callable[[], Tensor]

    def lines(self, is_stopping: Callable[[], bool]) -> Iterator[tuple[str, str]]:
        """Each name, and its line."""
        tensor = self.canonical()
        found = hashlib.sha256()
        for block in _blocks(tensor):
            if is_stopping():
                raise Stopped
            found.update(block.cpu().numpy().data)
        for name in self.names:
            fields = [name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape), found.hexdigest()]
            yield name, json.dumps(fields, separators=(",", ":"), ensure_ascii=False) + "\n"


def _entries(model: nn.Module) -> list[_Entry]:
    """The tensors of `state_dict()`, one of several names once; large ones first, so that threads end together."""
    rearranged = dict(_rearranged(model))
    entries: dict[Hashable, _Entry] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            place = tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()
            key = place if tensor.numel() else name
            give = rearranged.get(name) or functools.partial(_itself, tensor)
            entries.setdefault(key, _Entry([], tensor.nbytes, give)).names.append(name)
    return sorted(entries.values(), key=lambda entry: -entry.nbytes)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _rearranged(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Codes and scales that a kernel keeps elsewhere, and what brings each back."""
    for path, module in model.named_modules():
        scheme: Any = getattr(module, "scheme", None)
        if not isinstance(scheme, (LinearScheme, MoEScheme)) or scheme.arrangement(module) is None:
            continue
        for key, layout in scheme.layouts(module).items():
            for number, name in enumerate(layout.format.names(f"{path}.{key}" if path else key)):
                yield name, functools.partial(_canonical, scheme, module, key, number)


def _canonical(scheme: LinearScheme | MoEScheme, module: nn.Module, key: str, number: int) -> Tensor:
    return scheme.layouts(module)[key].without_padding(scheme.canonical(module, key))[number]


def _lines(entries: Sequence[_Entry], workers: int) -> dict[str, str]:
    """The line of each name."""
    # Threads share the iterator: the interpreter makes each step of it atomic.
    left, lines = iter(entries), dict[str, str]()

    def work(crew: Crew, _: int) -> None:
        with torch.inference_mode():
            for entry in left:
                lines.update(entry.lines(lambda: crew.stopping))

    Crew(workers, None).work(work)
    return lines


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in row-major order, a chunk at a time; nothing else is copied where it is contiguous."""
    if tensor.is_contiguous():
        flat = tensor.detach().reshape(-1)
        if flat.numel() == 1:  # whose stride may be any number
            flat = flat.clone(memory_format=torch.contiguous_format)
        yield from flat.view(torch.uint8).split(CHUNK_BYTES)
    elif tensor.nbytes <= CHUNK_BYTES:
        yield from _blocks(tensor.contiguous())
    else:
        rows = max(1, CHUNK_BYTES * tensor.shape[0] // tensor.nbytes)
        for part in tensor.split(rows):
            yield from _blocks(part if len(part) > 1 or part.nbytes <= CHUNK_BYTES else part[0])
