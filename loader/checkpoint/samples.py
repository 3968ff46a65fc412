"""What a file of weights is known by without reading all of it: its header, and samples of the rest."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from ..kernels import system_calls

_HEADER_AT_ONCE = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def sampled(file: BinaryIO, size: int) -> str:
    """A digest of the header, and of pages of 4 KiB spread evenly over the file: two trainings of one model differ
    there."""
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
